"""Names that TRL, PEFT, torchtune, Axolotl and LLaMA-Factory give to keys, and the keys here."""

from collections.abc import Sequence
from typing import NamedTuple

from minitune.errors import nearest

ROWS = "batch_size counts the rows of a whole step, micro_batch_size those in the model at once"
GLOBS = 'globs such as ["*.q_proj.weight"]; "*_proj.weight" is every linear map of a layer'
NF4 = '[[stage]] op = "quantize", scheme = { kind = "nf4" } before lora: programs/qlora.toml'
COLUMNS = 'columns = { output = "answer" } says which column is what'
# fmt: off
# (key here, what a reader must know of it, the names elsewhere)
KEYS = (
    ("train.optimizer.lr", "", "learning_rate lr max_lr peak_lr base_lr"),
    ("train.steps", "",
        "max_steps num_steps total_steps max_iters iters train_steps"),
    ("train.steps", "theirs are those of one epoch; steps = epochs x that", "max_steps_per_epoch"),
    ("train.epochs", "in place of steps", "num_train_epochs num_epochs n_epochs max_epochs epochs"),
    ("train.batch_size", ROWS,
        "per_device_train_batch_size train_batch_size global_batch_size batch_size"),
    ("train.micro_batch_size", ROWS,
        "gradient_accumulation_steps grad_accum accumulate_grad_batches gradient_accumulation "
        "grad_accumulation_steps micro_batch device_batch_size"),
    ("eval.batch_size", "", "per_device_eval_batch_size eval_batch_size val_batch_size"),
    ("train.schedule.warmup_steps", "a number of steps",
        "warmup_ratio warmup warmup_steps num_warmup_steps lr_warmup_steps warmup_iters"),
    ("train.schedule", 'schedule = { kind = "cosine" }',
        "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style"),
    ("train.schedule.end", "a share of the highest rate",
        "min_lr min_lr_ratio lr_min cosine_min_lr_ratio"),
    ("train.clip_norm", "",
        "max_grad_norm gradient_clip_val gradient_clipping grad_clip clip_grad_norm clip_grad "
        "max_norm"),
    ("train.optimizer.weight_decay", "", "weight_decay wd"),
    ("train.optimizer.betas", "both in one array", "adam_beta1 adam_beta2 beta1 beta2 betas"),
    ("train.optimizer.eps", "", "adam_epsilon adam_eps epsilon eps"),
    ("train.optimizer", 'optimizer = { kind = "adamw", lr = 1e-4 }',
        "optim optimizer_type optimizer_name"),
    ("lora.rank", "", "r lora_r lora_rank rank"),
    ("lora.alpha", "", "lora_alpha alpha"),
    ("lora.targets", GLOBS,
        "target_modules lora_target lora_target_modules lora_target_linear lora_attn_modules "
        "targets"),
    ("lora.dropout", "", "lora_dropout"),
    ("lora.dora", "", "use_dora peft_use_dora"),
    ("lora.rslora", "", "use_rslora peft_use_rslora"),
    ("lora.train", "globs of weights that train whole", "modules_to_save lora_modules_to_save"),
    ("lora.train", 'bias = "all" is train = ["*.bias"]', "bias lora_bias"),
    ("lora.targets", 'the globs "*.mlp.*_proj.weight" and "lm_head.weight"',
        "apply_lora_to_mlp apply_lora_to_output"),
    ("lora.ranks", "glob -> rank", "rank_pattern"),
    ("train.load_balance", "", "router_aux_loss_coef moe_aux_loss_coeff aux_loss_alpha"),
    ("train.privacy.epsilon", "", "target_epsilon"),
    ("train.privacy.noise", "", "noise_multiplier"),
    ("train.privacy.max_norm", "", "max_per_sample_grad_norm per_sample_max_grad_norm"),
    ("train.neftune_alpha", "", "neftune_noise_alpha noisy_embedding_alpha neftune_alpha"),
    ("train.decay_factors", '{ "*norm*" = 0.0 } spares norms',
        "no_decay no_decay_params no_weight_decay weight_decay_groups"),
    ("train.lr_factors", "glob -> factor", "loraplus_lr_ratio embedding_lr lr_groups"),
    ("quantize.scheme", NF4,
        "load_in_4bit load_in_8bit bnb_4bit_quant_type quantization_bit quantize_base "
        "use_qlora qlora"),
    ("model.dtype", "", "dtype bf16 fp16 torch_dtype precision mixed_precision float16 bfloat16"),
    ("train.loss_scale.initial", "of float16 compute", "initial_scale_power loss_scale init_scale"),
    ("train.remat", "true recomputes blocks in the backward pass",
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing "
        "use_gradient_checkpointing"),
    ("train.remat", '"host" keeps block inputs there',
        "enable_activation_offloading activation_offloading"),
    ("train.compiled", "", "torch_compile compile compile_model"),
    ("data.train.seq_len", "tokens; of each [data] table",
        "max_seq_length max_seq_len max_length sequence_len cutoff_len block_size "
        "model_max_length context_length seq_length"),
    ("harness.max_length", "tokens", "max_seq_length max_seq_len max_model_len"),
    ("harness.n_shots", "", "num_fewshot n_shot fewshot"),
    ("harness.chat_template", "", "apply_chat_template"),
    ("data.train.packed", "", "packing sample_packing pack"),
    ("data.train.packed", "documents share a row without padding", "padding_free"),
    ("data.train.train_on", "",
        "train_on_inputs train_on_input completion_only_loss assistant_only_loss mask_prompt "
        "train_on_prompt roles_to_train masking_strategy"),
    ("data.train.columns", COLUMNS,
        "dataset_text_field column_map prompt_field prompt_column field_instruction field_output "
        "conversation_column"),
    ("data.train.path", "",
        "train_file dataset dataset_path dataset_name datasets data_path data_files train_data"),
    ("data.heldout.path", "",
        "eval_dataset validation_file val_file eval_file test_datasets validation_data"),
    ("data.train.holdout", "share of the rows; 0 keeps none apart",
        "val_set_size val_size validation_split test_size holdout"),
    ("data.train.format", '"chat" reads messages and ShareGPT\'s conversations',
        "conversation_style chat_format dataset_format"),
    ("data.train.split", "part of a file", "dataset_split"),
    ("model.path", "",
        "checkpoint_dir checkpoint_files checkpointer model_name_or_path base_model model_id "
        "model_name pretrained_model base_model_name"),
    ("model.deltas", 'of a folder; "lora" is a stage, [[stage]] op = "lora"', "adapter"),
    ("model.deltas", "", "adapter_path adapter_name_or_path lora_model_dir peft_model_id"),
    ("model.tokenizer", "a folder, if not the model's; its max_seq_len is data.train.seq_len",
        "tokenizer"),
    ("model.tokenizer", "", "tokenizer_path tokenizer_name tokenizer_name_or_path"),
    ("model.device", "", "device_map device use_cpu"),
    ("model.chat_template_kwargs", "", "enable_thinking"),
    ("out", "the run lies in out/name", "output_dir out_dir save_dir"),
    ("name", "", "run_name experiment_name"),
    ("seed", "", "data_seed random_seed manual_seed"),
    ("resume", "", "resume_from_checkpoint auto_resume_from_checkpoints"),
    ("log.every", "steps between two rows", "logging_steps log_every_n_steps log_interval"),
    ("log.wandb", 'wandb = { project = "..." }', "report_to wandb_project use_wandb metric_logger"),
    ("log.mlflow", "mlflow = {}", "mlflow_tracking_uri use_mlflow"),
    ("log.tensorboard", "tensorboard = {}", "use_tensorboard"),
    ("log.trackio", "trackio = {}", "use_trackio trackio_project"),
    ("train.evaluate.every", 'evaluate = { data = "heldout", every = 100 }',
        "eval_steps eval_interval eval_strategy evaluation_strategy val_check_interval "
        "eval_every run_val_every_n_steps"),
    ("train.evaluate.batch_size", "", "batch_size_val"),
    ("train.evaluate.patience", "", "early_stopping_patience early_stopping"),
    ("train.evaluate.keep", '"best", as it is if absent', "load_best_model_at_end"),
    ("train.evaluate.min_delta", "nats",
        "early_stopping_threshold early_stopping_min_delta min_delta"),
    ("train.evaluate.at_start", "", "eval_on_start evaluate_at_start val_before_train"),
    ("train.save_every", "steps", "save_steps save_interval save_strategy checkpoint_interval"),
    ("train.keep", "saved states on the disk", "save_total_limit keep_last_n_checkpoints"),
    ("train.loss.beta", "", "beta dpo_beta kl_beta rl_beta"),
    ("train.loss.label_smoothing", "", "label_smoothing_factor label_smoothing"),
    ("train.loss.ratio", "share of the divergence, the rest is cross-entropy", "kd_ratio"),
    ("train.loss.nll_weight", "of cpo", "cpo_alpha"),
    ("train.loss.gamma", "of simpo, in nats: that ratio times beta", "gamma_beta_ratio"),
    ("train.loss.gamma", "of simpo, in nats", "simpo_gamma"),
    ("train.reference", 'reference = "cached"',
        "precompute_ref_log_probs precompute_reference_log_probs"),
    ("train.loss", 'loss = { kind = "dpo" }', "loss_type pref_loss rl loss_fn"),
    ("train.teacher.path", "", "teacher_model_name_or_path teacher_model teacher_model_path"),
    ("profile.steps", "a table [profile] of the program with steps = [10, 12]", "profiler profile"),
    ("generate.sampling", "sampling = { temperature = 0.7, top_p = 0.9 }",
        "do_sample temperature top_p top_k min_p repetition_penalty generation_config"),
)
# (what stands here in place of a key, the names elsewhere)
NO_KEYS = (
    ("attention needs no choice here",
        "attn_implementation flash_attention use_flash_attn sdp_attention"),
    ("no code of a model folder is ever run", "trust_remote_code"),
    ("tokenized data is mapped from disk, without workers", "dataloader_num_workers num_workers"),
    ("rows are always shuffled, by seed and epoch", "shuffle shuffle_seed"),
    ("memory is logged with every step", "log_peak_memory_stats"),
    ("a gradient is kept until its step is taken", "optimizer_in_bwd"),
    ("attention has no dropout; lora.dropout drops what goes into an adapter", "attn_dropout"),
    ("a document is never cut between rows", "split_across_pack"),
    ("which blocks are computed again is train.remat: true, or a size that the others may keep",
        "ac_mode ac_option"),
    ('weights stay on the device; several processes share them: plan = "fsdp"',
        "fsdp_cpu_offload"),
    ("every line of the screen is in log.txt, which has no levels", "log_level"),
    ("a system message is the column system of a row, or the first message",
        "new_system_prompt system_prompt default_system"),
    ("torchtune's components are tables here: docs/from-torchtune.md", "_component_"),
    ("beams are not there: answers are the likeliest tokens, or drawn", "num_beams"),
    ("the share of answers that a student writes is not there: teachers read the data's", "lmbda"),
    ("fine-tuning beside the preference is not there for dpo; orpo and cpo have it", "rpo_alpha"),
    ("texts are written by the model's chat template: docs/templates.md", "prompt_template"),
    ("half a wave is the only cosine: cycles are not there", "num_cycles"),
    ("the optimizer is fused wherever torch has it", "fused foreach"),
    ("seq_len holds prompt and answer together; overlong says what becomes of a longer row",
        "max_prompt_length max_completion_length"),
    ("rows come in a random order, and packed = true saves the padding",
        "group_by_length length_column_name"),
    ('[[stage]] op = "upload" with repo = "OWNER/NAME" uploads a result',
        "push_to_hub hub_model_id hub_strategy"),
    ("a launcher says the ranks, which share out the rows: docs/launching.md",
        "deepspeed ddp_timeout local_rank"),
    ('plan = "fsdp" cuts the weights over the ranks: docs/launching.md',
        "fsdp fsdp_config data_parallel_shard_dim"),
    ('plan = "tp_fsdp" shares linear maps along the axis tensor of the mesh: docs/sharding.md',
        "tensor_parallel_size tensor_parallel_dim"),
    ("deltas begin as in LoRA: a is drawn, b is zero; PiSSA, OLoRA and LoftQ are not there",
        "init_lora_weights peft_init_lora_weights loftq_config"),
    ("weights are always written as safetensors",
        "safetensors save_safetensors safe_serialization"),
)
# fmt: on


class _Here(NamedTuple):
    """Sentence on a name, and the last word of the key that it offers ("" where it offers none)."""

    key: str
    sentence: str


def _sentences() -> dict[str, list[_Here]]:
    found: dict[str, list[_Here]] = {}
    for key, note, names in KEYS:
        for name in names.split():
            sentence = f"{name} is {key} here{f': {note}' if note else ''}"
            found.setdefault(name, []).append(_Here(key.rpartition(".")[2], sentence))
    for note, names in NO_KEYS:
        found |= {name: [_Here("", note)] for name in names.split()}
    return found


SENTENCES = _sentences()


def suggest(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown key: what it is here, else the nearest known key.

    Of several keys that a name may mean it is the one that stands among those known.
    """
    meant = SENTENCES.get(name.strip("-").replace("-", "_").casefold())
    if meant is None:
        return nearest(name, known)
    return f"; {next((one for one in meant if one.key in known), meant[0]).sentence}"
