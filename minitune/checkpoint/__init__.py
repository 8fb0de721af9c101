"""Weights and training states on disk: safetensors and JSON only."""

from minitune.checkpoint.fingerprint import fingerprint as fingerprint
from minitune.checkpoint.fingerprint import folder_fingerprint as folder_fingerprint
from minitune.checkpoint.generation_config import generation_config as generation_config
from minitune.checkpoint.hf_folder import FolderExtras as FolderExtras
from minitune.checkpoint.hf_folder import save_folder as save_folder
from minitune.checkpoint.hf_weights import check_weights as check_weights
from minitune.checkpoint.hf_weights import load_params as load_params
from minitune.checkpoint.state import list_states as list_states
from minitune.checkpoint.state import load_state as load_state
from minitune.checkpoint.state import save_state as save_state
from minitune.checkpoint.tensors import load_tensors as load_tensors
from minitune.checkpoint.tensors import save_tensors as save_tensors
from minitune.checkpoint.tensors import serialized as serialized
from minitune.checkpoint.weight_files import weight_files as weight_files
