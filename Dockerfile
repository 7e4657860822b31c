# passdeploy on a machine without a GPU. For one with an NVIDIA GPU: Dockerfile.cuda
#
#   docker build -t passdeploy .
#   docker run --rm -v "$PWD:/work" passdeploy prune --recipe mobilenetv2.yaml
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY passdeploy passdeploy
COPY recipes recipes
RUN pip install --no-cache-dir ".[cpu,rtx,timm,demo]"
WORKDIR /work
ENTRYPOINT ["passdeploy"]
