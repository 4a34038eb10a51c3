"""Where Snakemake keeps what it knows of a study's outputs."""

from base64 import urlsafe_b64encode


def ignore_pattern(study: str) -> str:
    """The line of .dvcignore that leaves out Snakemake's metadata of a study.

    A metadata file is named by base64 of its output's path, `results/<study>/...`. Base64 packs 3 bytes into
    4 characters, so where the prefix ends within a character, every value that it can still take is listed;
    `quick` then does not take `quick-2` along.
    """
    prefix = f"results/{study}/".encode()
    whole = len(prefix) * 8 // 6
    fixed = urlsafe_b64encode(prefix + b"\0\0\0").decode()[:whole]
    if len(prefix) % 3 == 0:
        return f"/.snakemake/metadata/{fixed}*"
    last = {urlsafe_b64encode(prefix + bytes([byte, 0, 0])).decode()[whole] for byte in range(128)}
    return f"/.snakemake/metadata/{fixed}[{''.join(sorted(last))}]*"
