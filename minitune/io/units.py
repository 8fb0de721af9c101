"""Numbers of bytes as people read them."""


def format_bytes(n: int) -> str:
    """Bytes as a person reads them: 512 B, 1.5 KiB, 257.3 MiB."""
    size, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
