"""Package metadata. The ranges are what the code needs; ``constraints.txt`` pins what was tested together."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.10",
    "torchvision>=0.25",
    # 0.19.8 is the first release that skips a non-finite step under ZeRO-3 instead of destroying the weights.
    "deepspeed>=0.19.8",
    "ninja",  # DeepSpeed builds its shared-memory op with it the first time a process group starts on the CPU
    "timm>=1.0.20",
    "open_clip_torch>=3.0",
    "safetensors>=0.4.3",
    "numpy>=1.26",
    "pillow>=10.1",
    "pydantic>=2.7",
    "pyyaml>=6",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
]
EXTRAS = {
    # setuptools: ffcv imports distutils, which Python 3.12 only has through setuptools' shim.
    # tbb: numba's only threading layer that survives two loaders and a fork.
    "ffcv": ["ffcv>=1.0.2", "numba>=0.60", "setuptools", "tbb; platform_machine == 'x86_64'"],
    "detection": ["pycocotools>=2.0.7"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "mypy>=1.11",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="mrmae_ds",
    version="0.1.0",
    description="MR-MAE (Mimic before Reconstruct) pre-training at scale with DeepSpeed ZeRO-3",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mrmae_ds", "mrmae_ds.*"]),
    python_requires=">=3.10,<3.13",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mrmae = mrmae_ds.cli.main:main"]},
)
