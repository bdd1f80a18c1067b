#!/usr/bin/env bash
# On the machine, as root: SCONE from an archive of its source into /data/scone/venv, and its service.
# usage: install.sh ARCHIVE USER [TORCH_INDEX]      (TORCH_INDEX: a package index of PyTorch builds)
set -euo pipefail

archive="${1:?usage: install.sh ARCHIVE USER [TORCH_INDEX]}"
user="${2:?usage: install.sh ARCHIVE USER [TORCH_INDEX]}"
index="${3:-}"
root="${SCONE_ROOT:-/data/scone}"

install -d -o "$user" "$root" "$root/source" "$root/outputs" "$root/cache"
tar --extract --gzip --file "$archive" --directory "$root/source" --no-same-owner
if [[ ! -x "$root/venv/bin/python" ]]; then
    python3 -m venv "$root/venv"
fi
pip=("$root/venv/bin/python" -m pip install --quiet --constraint "$root/source/constraints.txt")
# torch first and pinned: a later range would be free to fetch another build of it
"${pip[@]}" ${index:+--index-url "$index"} torch
"${pip[@]}" "$root/source[offline]"
chown -R "$user" "$root"
"$root/venv/bin/scone" --version

if [[ -d /run/systemd/system ]]; then
    sed "s/@USER@/$user/; s#@ROOT@#$root#g" "$(dirname "$0")/scone-train.service" >/etc/systemd/system/scone-train.service
    systemctl daemon-reload
fi
