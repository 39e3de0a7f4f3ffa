#!/usr/bin/env bash
# Train, evaluate, attack and report as Slurm jobs, each of which waits for the success of the one that it needs.
#
#   launch/chain.sh --sbatch '--time=4:00:00 --nodes=2' --attack '--forget attack.jsonl' \
#       train.py --lora-rank 16 --output runs/mine
#   launch/chain.sh --sbatch '--time=2:00:00' --list grid.txt           every stage as a job array, line by line
#   launch/chain.sh --sbatch '--time=4:00:00' train.py --config launch/recipes/lora-adamw.toml
#
#   --evaluate FLAGS   of evals/run.py, beside --model and --out; e.g. '--tasks wmdp_bio mmlu --data-dir questions'
#   --attack FLAGS     of evals/tamper.py, beside --model and --output; without it nothing is attacked
#   --sbatch OPTIONS   for every job, e.g. '--account=ours --time=4:00:00'
#   --env NAME, --ranks N   as in slurm.sh
#   --list FILE        training commands, one a line, instead of one
#   --dry-run          print what would be submitted
#
# Results: RUN (its --output, or its --config's), RUN-original (the original model's accuracies; with a list, FILE-original), RUN/evals,
# RUN-attack and RUN/report.html. A job that fails cancels those that need it; the report comes in any case, of what
# there is.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

dry_run=false evaluate='' attack='' options='' list='' job=(launch/slurm.sh)
while (($#)); do
    case $1 in
        --dry-run) dry_run=true && shift && continue ;;
        --evaluate) evaluate=$(value_of "$@") ;;
        --attack) attack=$(value_of "$@") ;;
        --sbatch) options=$(value_of "$@") ;;
        --env | --ranks) value=$(value_of "$@") && job+=("$1" "$value") ;;
        --list) list=$(value_of "$@") ;;
        [!-]*) break ;;
        *) fail "expected --dry-run, --evaluate, --attack, --sbatch, --env, --ranks or --list before train.py; found $1" ;;
    esac
    shift 2
done
split_words "$options"
options=("${words[@]}")
split_words "$evaluate"
evaluate_flags=("${words[@]}")
split_words "$attack"
attack_flags=("${words[@]}")

if [[ -n $list ]]; then
    (($# == 0)) || fail "expected either --list or a command; found both"
    read_list "$list"
else
    (($#)) || fail "expected train.py and its flags, or --list; found neither"
    commands=("$(show "$@")")
fi

# The commands of each stage, one a line for each training command.
declare -A stages=([train]='' [after]='' [attack]='' [report]='')
original='' results=$list-original
for command in "${commands[@]}"; do
    split_words "$command"
    [[ ${words[0]} == train.py ]] || fail "expected commands that start with train.py; found ${words[0]}"
    run=$(value_of_run --output "${words[@]}")
    model=$(value_of_run --model "${words[@]}")
    [[ -n $run ]] || fail "expected --output in the flags of train.py; found none in: $command"
    model=${model:-EleutherAI/deep-ignorance-unfiltered}
    [[ $model == "${original:=$model}" ]] || fail "expected one --model in the list; found $original and $model"
    [[ -n $list ]] || results=$run-original
    stages[train]+=$command$'\n'
    stages[after]+=$(show evals/run.py --model "$run/model" --out "$run/evals" "${evaluate_flags[@]}")$'\n'
    stages[attack]+=$(show evals/tamper.py --model "$run/model" --output "$run-attack" "${attack_flags[@]}")$'\n'
    stages[report]+=$(show -m unlearn report "$run" --evals "$results")$'\n'
done

# Submit the stage $1, after the jobs that the option $2 names, and put its job's number into `id`.
submit() {
    local stage=$1 command=(sbatch --parsable "--job-name=unlearn-$1") size=() ranks=()
    if [[ $stage == report ]]; then size=(--nodes=1) ranks=(--ranks 1); fi
    if [[ -n $2 ]]; then command+=("--dependency=$2" --kill-on-invalid-dep=yes); fi
    if [[ -n $list ]]; then
        local file=$list
        if [[ $stage != train ]]; then file=$list.$stage; fi
        command+=("--array=1-${#commands[@]}" "${options[@]}" "${size[@]}" "${job[@]}" "${ranks[@]}" --list "$file")
        if [[ $stage != train ]] && ! $dry_run; then printf '%s' "${stages[$stage]}" >"$file"; fi
    else
        split_words "${stages[$stage]}"
        command+=("${options[@]}" "${size[@]}" "${job[@]}" "${ranks[@]}" "${words[@]}")
    fi
    run_or_show "$stage" "${command[@]}"
}

# Run the sbatch command $2..., and put the job's number into `id`; or print it, and put the stage's name there.
run_or_show() {
    local stage=$1
    shift
    if $dry_run; then
        show "$@"
        id=${stage^^}
        return
    fi
    id=$("$@")
    id=${id%%;*}
    echo "$stage: job $id"
}

$dry_run || mkdir -p "$results" # the report says so if nothing comes
split_words "$(show evals/run.py --model "$original" --out "$results" "${evaluate_flags[@]}")"
run_or_show original sbatch --parsable --job-name=unlearn-original "${options[@]}" "${job[@]}" "${words[@]}"
jobs=$id
# In arrays line i needs line i (aftercorr).
needs=afterok
if [[ -n $list ]]; then needs=aftercorr; fi
submit train ''
jobs+=:$id train=$id
submit after "$needs:$train"
jobs+=:$id
if [[ -n $attack ]]; then
    submit attack "$needs:$id"
    jobs+=:$id
fi
submit report "afterany:$jobs"
