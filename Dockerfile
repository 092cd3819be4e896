# `calm serve` in a container.
#
#   docker build -t calm .                                                    # CPU
#   docker build -t calm --build-arg TORCH_INDEX=https://pypi.org/simple .   # torch with CUDA; run with --gpus all
#   printf '%s\n' "$(openssl rand -hex 32)" > keys
#   docker run --rm -p 8000:8000 -v "$PWD/runs/calm:/model:ro" -v "$PWD/keys:/keys:ro" calm
#
# The container listens on all of its addresses, so that it needs a file of API keys. For a test on one machine, without a key:
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/calm:/model:ro" calm /model --host 0.0.0.0 --insecure
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[serve]" && rm -rf /src/*

RUN useradd --create-home calm
USER calm
WORKDIR /home/calm
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["calm", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--api-key-file", "/keys"]
