#!/usr/bin/env bash
# Train on a machine that may go away at any moment, and keep the run in a folder that stays, such as a bucket that is
# mounted there:
#
#     recipes/keep_output.sh OUTPUT_DIR KEPT_DIR COMMAND...
#
# The command writes OUTPUT_DIR, on a local disk: a run appends to its logs and renames folders, which mounted buckets
# do late or not at all. Every 30 seconds (KEEP_SECONDS) and at the end, whole files are copied to KEPT_DIR. On a new
# machine the same line brings OUTPUT_DIR back first, and the command goes on from its last complete checkpoint. The
# exit status is the command's. KEPT_DIR must be for this run alone: checkpoints that the run deletes are deleted there,
# too.
set -euo pipefail

if (( $# < 3 )); then
    echo "usage: $0 OUTPUT_DIR KEPT_DIR COMMAND..." >&2
    exit 2
fi
output=$1 kept=$2
shift 2
mkdir -p "$output" "$kept"
declare -A is_kept=()

copy() { # FROM TO CONDITIONS...: the files below FROM that `find` names, but for hidden ones
    local from=$1 to=$2 file
    shift 2
    while IFS= read -r -d '' file; do
        mkdir -p "$to/${file%/*}" && cp "$from/$file" "$to/$file" || return 1
    done < <(cd "$from" && find . -name '.?*' -prune -o -type f "$@" -print0)
}

listing() { # FOLDER NAME: the files below NAME, with their sizes
    (cd "$1" && find "$2" -type f -printf '%s %p\n' | sort)
}

# A checkpoint in KEPT_DIR is whole if it has the files that are noted beside it, and the logs are not behind it. A bucket
# may have got them in any order.
is_whole() {
    local name=$1 size file
    [[ -e $kept/.$name.files && -e $kept/.$name.logs ]] || return 1
    [[ $(listing "$kept" "$name") == "$(< "$kept/.$name.files")" ]] || return 1
    while read -r size file; do
        (( $(stat -c %s "$kept/$file" 2>/dev/null || echo 0) >= size )) || return 1
    done < "$kept/.$name.logs"
}

copy_out() {
    local checkpoints=() checkpoint name files
    # Listed before the logs are copied, which then have at least the lines that these checkpoints know of. Lines beyond
    # them are removed when the run continues.
    for checkpoint in "$output"/checkpoint-*; do
        [[ ! -d $checkpoint ]] || checkpoints+=("$checkpoint")
    done
    if [[ -e $output/run.json && ! -e $kept/run.json ]]; then
        cp "$output/run.json" "$kept/run.json" || return 1
    fi
    copy "$output" "$kept" ! -path './checkpoint-*' ! -path ./run.json || return 1
    for checkpoint in "${checkpoints[@]}"; do
        name=${checkpoint##*/}
        [[ -z ${is_kept[$name]:-} ]] || continue # its files never change
        if files=$(listing "$output" "$name") && copy "$output" "$kept" -path "./$name/*"; then
            (cd "$kept" && stat -c '%s %n' -- *.jsonl) > "$kept/.$name.logs" || return 1
            echo "$files" > "$kept/.$name.files" || return 1
            is_kept[$name]=1
        elif [[ -d $checkpoint ]]; then # else the run has deleted it meanwhile
            return 1
        fi
    done
    if [[ -e $output/run.json ]]; then # last, since it says whether the run has finished
        cp "$output/run.json" "$kept/run.json" || return 1
    fi
    (( ${#checkpoints[@]} )) || return 0
    for checkpoint in "$kept"/checkpoint-*; do
        name=${checkpoint##*/}
        [[ -d $output/$name ]] || rm -r -f "$kept/.$name.files" "$kept/.$name.logs" "$checkpoint" || return 1
    done
}

if [[ ! -e $output/run.json && -e $kept/run.json ]]; then
    echo "bringing back $output from $kept" >&2
    copy "$kept" "$output" ! -path './checkpoint-*'
    for checkpoint in "$kept"/checkpoint-*; do
        [[ -d $checkpoint ]] || continue
        if is_whole "${checkpoint##*/}"; then
            copy "$kept" "$output" -path "./${checkpoint##*/}/*"
        else
            echo "leaving out ${checkpoint##*/}, which was not copied whole" >&2
        fi
    done
fi

"$@" &
command=$!
trap 'kill -TERM "$command"' TERM
trap 'kill -INT "$command"' INT
seconds=0
while kill -0 "$command" 2>/dev/null; do
    sleep 1 &
    wait $! || true # a signal ends this wait at once
    (( ++seconds % ${KEEP_SECONDS:-30} )) || copy_out || echo "could not copy all to $kept; trying again" >&2
done
status=0
wait "$command" || status=$?
copy_out
exit "$status"
