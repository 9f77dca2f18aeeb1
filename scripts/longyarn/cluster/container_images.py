"""Which image the stages run in under `--sdm apptainer`, and what Apptainer is told about it.

`container.image` is `cpu` or `cuda`, an image of ours; or `docker://name@sha256:…`; or a `.sif` file.
An image of ours is named by its recipe: a hash of its Dockerfile or definition, of the script that
installs, and of every lock file installed. So a changed lock asks for another image.
"""

import hashlib
import os
import shutil
from pathlib import Path

import yaml

from longyarn.core.errors import UserError
from longyarn.core.files import ROOT, located

LOCKS = {
    "cpu": ("cpu", "build", "run", "harness"),
    "cuda": ("cuda", "build", "run", "harness", "flash"),
}

# Never from the host: its modules are not the image's.
PYTHON = {"PYTHONNOUSERSITE": "1", "PYTHONPATH": "", "PYTHONHOME": ""}

# Variables of the host that name files or directories which the stages then read.
HOST_PATHS = (
    "PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HF_HOME",
)  # fmt: skip


def recipe(image: str, kind: str, root: Path) -> str:
    """Return the recipe of `cpu` or `cuda`: 12 hexadecimal digits over all that it is built from.

    ``kind`` is `Dockerfile` or `def`; ``root`` is the repository.
    """
    files = [root / "containers" / f"{image}.{kind}", root / "containers" / "install"]
    files += [root / "envs" / f"{lock}.txt" for lock in LOCKS[image]]
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def sif(image: str, cache: str, root: Path) -> Path:
    """Return where `make sif` puts an image of ours as one file, and where a run looks for it."""
    return Path(cache) / "images" / f"longyarn-{image}-{recipe(image, 'def', root)}.sif"


def resolve(config: dict, root: Path) -> str:
    """Return the image for Snakemake's `container:`; it need not exist.

    For an image of ours: the digest in containers/images.yaml if it has this tree's recipe, else the
    .sif file of this tree's recipe.
    """
    image = config["container"]["image"]
    if image not in LOCKS:
        return image
    recorded = yaml.safe_load((root / "containers" / "images.yaml").read_text(encoding="utf-8"))
    entry = recorded.get(image)
    if entry and entry["recipe"] == recipe(image, "Dockerfile", root):
        return entry["image"]
    return str(sif(image, config["paths"]["cache"], root))


def missing(config: dict, root: Path) -> str | None:
    """Return one sentence if the image is a missing file, with the fix; else None."""
    image, resolved = config["container"]["image"], resolve(config, root)
    if resolved.startswith("docker://") or Path(resolved).exists():
        return None
    if image not in LOCKS:
        return f"container.image {image} is missing; build it or fix the path"
    return (
        f"the image {image} of this tree's lock files is neither in containers/images.yaml nor at "
        f"{resolved}; run `make sif IMAGE={image}`"
    )


def image_file(image: str, prefix: str | None = None) -> str:
    """Return the file that Snakemake runs ``image`` from; ``prefix`` is its --apptainer-prefix.

    It pulls docker://… to the MD5 of the address; a file is taken as it is.
    """
    if "://" not in image:
        return image
    name = hashlib.md5(image.encode(), usedforsecurity=False).hexdigest()
    return f"{prefix or '.snakemake/singularity'}/{name}.simg"


def exec_command(image: str, arguments: str = "", prefix: str | None = None) -> str:
    """Return the shell words that run a command in ``image`` as Snakemake would.

    For the one rule that calls Apptainer itself, after srun. ``arguments`` are --apptainer-args.
    """
    words = [program(), 'exec --home "$PWD"', arguments, image_file(image, prefix)]
    return " ".join(word for word in words if word)


def program() -> str:
    """Return what Snakemake calls: `apptainer`, or `singularity` where only that is installed."""
    found = shutil.which("singularity") and not shutil.which("apptainer")
    return "singularity" if found else "apptainer"


def environment(config: dict, make: bool = True) -> dict[str, str]:
    """Return the variables that bind the directories a job needs and keep the host's Python out.

    Apptainer itself mounts only the working directory (as the home), /tmp and a few others. The config's
    directories are made first unless ``make`` is False, because a missing directory cannot be bound;
    UserError if that fails. Variables that the user has set stay.
    """
    host, name = os.environ, program().upper()
    cache = Path(config["paths"]["cache"]).resolve()
    values = {f"{name}ENV_{key}": value for key, value in PYTHON.items()}
    # The home is the working directory there; caches that would land in it go where downloads are.
    for key, value in {"XDG_CACHE_HOME": cache, "TRITON_CACHE_DIR": cache / "triton"}.items():
        if f"{name}ENV_{key}" not in host:
            values[f"{name}ENV_{key}"] = str(value)

    token = Path(host.get("HF_TOKEN_PATH", "~/.cache/huggingface/token")).expanduser()
    if not {"HF_TOKEN", "HF_HOME"} & set(host) and token.is_file():
        values[f"{name}ENV_HF_TOKEN_PATH"] = str(token)  # of `hf auth login`, in the user's home

    paths = [Path(path) for path in config["paths"].values()]
    for key, path in zip(config["paths"], paths, strict=True):
        try:
            if make:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"paths.{key} cannot be made ({error}); choose another") from None
    sources = [config["model"]["source"], config["training"]["source"]]
    paths += [located(source) for source in sources if source]
    paths.append(token)
    if not ROOT.is_relative_to(Path.cwd()):  # the scripts of a workflow that stands elsewhere
        paths.append(ROOT)
    paths += [Path(part) for key in HOST_PATHS for part in host.get(key, "").split()]
    user = host.get("APPTAINER_BIND") or host.get("SINGULARITY_BIND") or ""
    binds = [bind for bind in user.split(",") if bind]
    for path in paths:
        if path.exists():
            real, given = path.resolve(), Path(os.path.abspath(path))
            binds.append(str(real))
            # A path through a link is not there inside, except below the working directory.
            if given != real and not given.is_relative_to(Path.cwd()):
                binds.append(f"{real}:{given}")
    values[f"{name}_BIND"] = ",".join(dict.fromkeys(binds))
    return values
