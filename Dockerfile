# passdeploy on a machine without a GPU. For one with an NVIDIA GPU: Dockerfile.cuda
#
#   docker build -t passdeploy .
#   docker run --rm -v "$PWD:/work" passdeploy prune --recipe mobilenetv2.yaml
FROM python:3.11-slim
# g++ is for torch.compile, which is one of the backends of `profile` and of latency targets.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY passdeploy passdeploy
COPY recipes recipes
RUN pip install --no-cache-dir ".[cpu,rtx,timm,demo]"
WORKDIR /work
ENTRYPOINT ["passdeploy"]
