# gist-train in a container: for NVIDIA GPUs, whose container toolkit the host needs then, or for a CPU.
#
#   docker build . --tag gist-train
#   docker build . --tag gist-train --build-arg TORCH_INDEX=ADDRESS                                   a CPU: no gigabytes of CUDA;
#                                      ADDRESS is the index of CPU wheels that PyTorch's page on installing names
#   docker build . --tag gist-train --build-arg EXTRAS=report,onnx,wandb                              other extras of pyproject.toml
#
#   as_me="--rm -it --init --user $(id -u):$(id -g) --volume $PWD:/data"
#   docker run $as_me gist-train train my.yaml                                                        a CPU
#   docker run $as_me --gpus all gist-train train my.yaml                                             a GPU
#   docker run $as_me --gpus all --ipc=host --entrypoint torchrun gist-train --nproc-per-node 4 -m gist_train train my.yaml
#   docker run $as_me --network host gist-train report my.yaml --follow       it serves on 127.0.0.1 alone: the host's, on Linux
#
# Models, data sets of the hub and compiled kernels are kept between runs, in .hub and .cache of the folder that is /data.
FROM python:3.11-slim

# Triton and torch.compile build code when it is first used. Python's headers, which it includes, are in the image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# What is large comes first: after an edit of the code the last two layers alone are made anew.
WORKDIR /source
COPY constraints.txt ./
# A further index, whose torch rules over the usual one's: its version is the same and says "+cpu" besides.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

# What pyproject.toml names, by an empty package that stands where ours will.
COPY pyproject.toml ./
ARG EXTRAS=report,onnx
RUN mkdir gist_train \
    && touch README.md LICENSE gist_train/__init__.py \
    && echo '__version__ = "0"' > gist_train/version.py \
    && pip install --no-cache-dir --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}" \
    && rm -rf build *.egg-info

COPY README.md LICENSE ./
COPY gist_train gist_train
RUN pip install --no-cache-dir --no-deps . \
    && rm -rf build *.egg-info \
    && install --directory --mode 1777 /data /home/gist-train

# A user that --user gives by number has neither name nor home, and libraries ask for both.
ENV USER=gist-train \
    HOME=/home/gist-train \
    HF_HOME=/data/.hub \
    XDG_CACHE_HOME=/data/.cache \
    TRITON_CACHE_DIR=/data/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/data/.cache/inductor
WORKDIR /data
USER 1000:1000
ENTRYPOINT ["gist-train"]
CMD ["--help"]
