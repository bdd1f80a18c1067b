#!/usr/bin/env bash
# As root on Linux: the install steps of the Azure machine and of the container in a bare Debian root, and SCONE used there.
# usage: deploy/check_bare_root.sh ROOT    (made by debootstrap where it is not there yet; needs some 6 GB and the network)
#   PIP_CONF   a pip.conf for the root: where an index of your own is used       WHEELS   a folder of wheels to prefer
# What differs from the real thing: Debian for Ubuntu, so no NVIDIA driver; no systemd running; Debian's Python in place
# of the container image's; PyTorch from the ordinary index, or from WHEELS, in place of PyTorch's own.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
root="$(realpath -m "${1:?usage: deploy/check_bare_root.sh ROOT}")"
[[ "$root" != / ]] || { echo "error: found the root of this system; expected a folder for another" >&2; exit 2; }

# In mount and process namespaces of its own, so that nothing of it is left, and with an environment of a first login.
inside() {
    # shellcheck disable=SC2016  # expanded by the inner shell
    unshare --mount --pid --fork bash -c 'mount -t proc proc "$0/proc" && mkdir -p "$0/dev/shm" &&
        mount -t tmpfs tmpfs "$0/dev/shm" && exec chroot "$0" "${@}"' "$root" \
        /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive "$@"
}

make_root() {
    if [[ ! -e "$root/etc/debian_version" ]]; then
        debootstrap --variant=minbase --include=ca-certificates bookworm "$root"
    fi
    cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
    if [[ -n "${PIP_CONF:-}" ]]; then  # with the certificates that such a network may need
        cp "$PIP_CONF" "$root/etc/pip.conf"
        cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    fi
    if [[ -n "${WHEELS:-}" ]]; then
        mkdir -p "$root/wheels"
        cp "$WHEELS"/*.whl "$root/wheels/"
        grep --quiet --no-messages /wheels "$root/etc/pip.conf" || printf '[install]\nfind-links = /wheels\n' >>"$root/etc/pip.conf"
    fi
}

# What cloud-init would do before install.sh: its packages (the driver's tool is Ubuntu's alone) and the user.
first_boot() {
    local packages
    packages="$(sed -n '/^packages:/,/^$/s/^  - //p' "$repository/deploy/azure/cloud-init.yaml" | grep -v ubuntu-)"
    inside apt-get update --quiet
    # shellcheck disable=SC2086  # a list of words
    inside apt-get install --quiet --yes --no-install-recommends $packages
    inside id scone >/dev/null 2>&1 || inside useradd --create-home scone
}

azure() {
    rm -rf "$root/data/scone"
    git -C "$repository" archive --format=tar.gz --output "$root/root/scone-source.tar.gz" HEAD
    cp "$repository/deploy/azure/install.sh" "$repository/deploy/azure/scone-train.service" "$root/root/"
    inside bash /root/install.sh /root/scone-source.tar.gz scone
    used_by_somebody /data/scone/venv/bin/scone
}

# Count, train a little, precompute, verify: as an ordinary user, in an empty folder.
used_by_somebody() {
    inside su scone --shell /bin/bash --command "set -e; rm -rf /tmp/used; mkdir -p /tmp/used/texts; cd /tmp/used; export SCONE_CACHE=\$PWD/cache
        cp /usr/lib/python3*/{calendar,copy,csv,heapq,shlex,textwrap}.py texts
        $1 --version
        $1 count --dataset_name texts --tokenizer train --vocab_size 300 --min_freq 4
        $1 train --dataset_name texts --tokenizer train --vocab_size 300 --min_freq 4 --max_length 32 --batch_size 2 \
            --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --max_steps 3 --device cpu --output_dir run
        $1 precompute --model_path run/final_model --output_path run/embeddings.cache
        $1 verify run"
}

# The Dockerfile's COPY and RUN, without the image's base.
container() {
    local line words
    rm -rf "$root/venv" "$root/source"
    if inside id scone >/dev/null 2>&1; then inside userdel --remove scone; fi
    while IFS= read -r line; do
        case "$line" in
            COPY\ *)
                read -r -a words <<<"${line#COPY }"
                mkdir -p "$root${words[-1]}"
                if [[ "${words[-1]}" == */ ]]; then
                    (cd "$repository" && cp "${words[@]:0:${#words[@]}-1}" "$root${words[-1]}")
                else
                    cp --recursive "$repository/${words[0]}/." "$root${words[-1]}"
                fi ;;
            RUN\ *) inside env TORCH_INDEX= bash -o pipefail -c "set -eu; ${line#RUN }" </dev/null ;;
        esac
    done < <(grep -v '^ *#' "$repository/deploy/container/Dockerfile" | sed -e ':a' -e '/\\$/{N;s/\\\n//;ba' -e '}')
    used_by_somebody /venv/bin/scone
}

make_root
first_boot
azure
container
echo "the steps of Azure and of the container work in a bare root"
