# shellcheck shell=bash
# What the scripts of this folder share: errors in one sentence, and words of a command line. To be sourced.

# End with one sentence on stderr.
fail() {
    echo "${0##*/}: error: $*" >&2
    exit 2
}

# The value that follows the option $1; $2 is the next word, if there is one.
value_of() {
    [[ -n ${2-} ]] || fail "expected a value after $1; found none"
    printf '%s' "$2"
}

# Cut the text $1 into words, at spaces outside quotes, and put them into the array `words`. Nothing is expanded or run.
# shellcheck disable=SC2034  # of `words`
split_words() {
    xargs -r printf '%s' >/dev/null 2>&1 <<<"$1" || fail "expected closed quotes; found $1"
    mapfile -d '' -t words < <(xargs -r printf '%s\0' <<<"$1")
}

# Print the value of the flag $1 among the words $2...: the word after it, or what follows its `=`; the last one counts.
flag_value() {
    local flag=$1 value='' word before=''
    shift
    for word in "$@"; do
        [[ $before == "$flag" ]] && value=$word
        [[ $word == "$flag="* ]] && value=${word#*=}
        before=$word
    done
    printf '%s' "$value"
}

# Put the commands of the list $1 into the array `commands`: a line each, empty lines and those that begin with # apart.
read_list() {
    [[ -f $1 ]] || fail "expected a list of commands, one a line; found no file at $1"
    mapfile -t commands < <(grep -v -e '^[[:space:]]*#' -e '^[[:space:]]*$' "$1")
    ((${#commands[@]})) || fail "expected commands in $1, one a line; found none"
}

# Print words as a line that a shell, and split_words, read back as the same words.
show() {
    local word line=()
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,%@+-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
    done
    printf '%s\n' "${line[*]}"
}

# Print the interpreter of this checkout: PYTHON, .venv's, or the system's.
interpreter() {
    local own
    own=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
    if [[ -n ${PYTHON-} ]]; then echo "$PYTHON"; elif [[ -x $own ]]; then echo "$own"; else echo python3; fi
}

# Print the value of the flag $1 among the words $2..., or else in the file that their --config names.
value_of_run() {
    local value file
    value=$(flag_value "$@") file=$(flag_value --config "${@:2}")
    if [[ -z $value && -n $file ]]; then
        value=$("$(interpreter)" -c 'import json, pathlib, sys, tomllib
file = pathlib.Path(sys.argv[1]).expanduser()
file = file / "config.json" if file.is_dir() else file
values = (json if file.suffix == ".json" else tomllib).loads(file.read_text())
print(values.get(sys.argv[2]) or "")' "$file" "${1#--}" 2>/dev/null) || fail "expected flags in $file; found none to read"
    fi
    printf '%s' "$value"
}
