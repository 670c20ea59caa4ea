# The software of the pipeline, pinned by pyproject.toml; the checkout is mounted, so table, config and results stay outside.
#
#   docker build --tag concept-ablation .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:$PWD" --workdir "$PWD" --volume /tmp:/tmp \
#     concept-ablation snakemake --cores all
#
# Without a GPU leave --gpus away. CUDA comes with torch: the host gives the driver and NVIDIA's container toolkit. /tmp holds
# the GPUs' locks (docs/running.md), so that two containers don't take one GPU.
FROM python:3.11.11-slim-bookworm

COPY pyproject.toml README.md /tmp/build/
RUN pip install --no-cache-dir '/tmp/build[gpu,nudenet]' && pip uninstall --yes concept-ablation && rm -r /tmp/build

# `--user` names a user that this image doesn't know: a home to write to, and the name that Snakemake asks for.
ENV HOME=/tmp LOGNAME=user
CMD ["snakemake", "--cores", "all"]
