# syntax=docker/dockerfile:1
#
#   docker build --tag llmprune .
#   mkdir -p runs
#   docker run --rm --gpus all --volume llmprune-cache:/cache --volume "$PWD/runs:/work/runs" \
#       --user "$(id -u):$(id -g)" llmprune run recipes/quickstart.yaml
#
# The torch wheel of the default index brings its own CUDA libraries: the image needs
# no CUDA base, and the host only the NVIDIA driver and its container toolkit. Without
# --gpus all the same image runs on the CPU.

FROM python:3.12-slim AS build

RUN pip install --no-cache-dir uv==0.13.9
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PYTHON_DOWNLOADS=never
WORKDIR /src

# The dependencies first: they are gigabytes and change less often than the code.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/llmprune \
    && uv pip install --python /opt/llmprune/bin/python --constraint constraints.txt \
       --requirements pyproject.toml --extra demo --extra oidc --extra postgresql --extra s3

COPY README.md CHANGELOG.md LICENSE mkdocs.yml ./
COPY llmprune llmprune

# The documentation, which the service serves: its tools are not part of the image. It shows recorded results and the
# table of the import test.
COPY docs docs
COPY eval/benchmarks/results eval/benchmarks/results
COPY tests/test_import_rules.py tests/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv /opt/docs \
    && uv pip install --python /opt/docs/bin/python --constraint constraints.txt --group docs \
    && PYTHONPATH=/src:$(echo /opt/llmprune/lib/python*/site-packages) /opt/docs/bin/python -m mkdocs build --quiet

# The recipe editor of the pages, from npm packages.
COPY .ci/editor.py .ci/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/docs/bin/python --constraint constraints.txt --group editor \
    && /opt/docs/bin/python .ci/editor.py

RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/llmprune/bin/python --no-deps .


FROM python:3.12-slim

# Open to any user, for --user lets the runs belong to the caller.
RUN useradd --uid 1000 --home-dir /cache --no-create-home llmprune \
    && install --directory --mode 1777 /cache /data /work /work/runs

COPY --from=build /opt/llmprune /opt/llmprune
COPY recipes /work/recipes
COPY eval /work/eval

# Downloaded and converted models live in /cache: keep it as a volume.
ENV PATH=/opt/llmprune/bin:$PATH \
    HOME=/cache \
    USER=llmprune \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
VOLUME /cache
WORKDIR /work
USER 1000

ENTRYPOINT ["llmprune"]
CMD ["--help"]
