# hadolint global ignore=DL3008,DL3013
# Two images, `docker build --target cpu .` and `docker build --target cuda .` (the default): the package with its commands,
# not the checkout. Versions are those of constraints.txt. Both keep the model hub's cache and all outputs in /workspace,
# which is meant to be a volume:
#
#     docker run --rm -v "$PWD:/workspace" lrsa-ds train +recipe=smoke
#     docker run --rm --gpus all --shm-size 16g -v "$PWD:/workspace" lrsa-ds train +recipe=qa_128k_1gpu
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/workspace/.cache/huggingface
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY benchmarks benchmarks
COPY conf conf
COPY launch launch
COPY lrsa_ds lrsa_ds
COPY recipes recipes
# torch first, from the index of builds without CUDA: the default build brings gigabytes of it.
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt pip install torch \
      --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple \
 && PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt pip install '.[lora]' \
 && rm -rf build
WORKDIR /workspace
ENTRYPOINT ["python", "-m", "lrsa_ds"]
CMD ["--help"]

# Triton and DeepSpeed's offloading compile small programs at run time: the image has a compiler and CUDA's headers.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/workspace/.cache/huggingface
ENV PATH=/opt/venv/bin:$PATH
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential ninja-build openssh-client pdsh python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY benchmarks benchmarks
COPY conf conf
COPY launch launch
COPY lrsa_ds lrsa_ds
COPY recipes recipes
RUN PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt pip install '.[8bit,liger,lora]' && rm -rf build
WORKDIR /workspace
ENTRYPOINT ["python", "-m", "lrsa_ds"]
CMD ["--help"]
