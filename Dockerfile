# gist-train in a container:
#   docker build -t gist-train .                                              NVIDIA GPUs: run it with --gpus all
#   docker build -t gist-train --build-arg TORCH_INDEX=ADDRESS .              CPU: ADDRESS is the index of CPU wheels that
#                                                                             PyTorch's page on installing names
#   docker run --rm -v "$PWD:/data" gist-train train my.yaml
# Models and data sets of the hub are kept in /data/.hub between runs.
FROM python:3.11-slim

# Where torch comes from; empty for the usual index, whose torch brings CUDA along: gigabytes that a CPU has no use for.
ARG TORCH_INDEX=

COPY . /source
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==2.13.0" \
    && pip install --no-cache-dir "/source[report,onnx]" \
    && rm -rf /source

ENV HF_HOME=/data/.hub
WORKDIR /data
ENTRYPOINT ["gist-train"]
CMD ["--help"]
