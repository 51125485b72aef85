#!/bin/bash
# What trained the networks of the appendix: run in examples/, with DATA where torchvision keeps CIFAR. A sweep that is stopped
# goes on with the same command. The experiment with equal budgets has its own command, in PLAN.md.
# The older ones have options that are gone. Commit 5466747 still knows sam_on, momentum_sam and --epsilon-schedule; commit
# a272590 knows all, also the rules blended and standardised, and --carry.
set -e

# cifar10-5000-unaugmented, cifar100-5000-unaugmented, cifar10-5000, cifar10
B="--data-dir DATA --train-samples 5000 --validation-samples 10000 --model cifar_resnet --width 16 --batch-size 128 \
    --groups 4 --schedule cosine --evaluate-every 40 --amp bf16 --compile --channels-last"
sweep() { python -m experiments sweep $B --no-augment --data $1 --epochs $2 --out runs/$1-5k "${@:3}"; }
# what is chosen by validation, with one seed
one() { sweep cifar10 40 --seeds 1 --factors 1 --methods "$@"; }
one plain one_pass --epsilons 0 0.05 0.1 0.2 0.3 0.4 --rule sign
one one_pass --epsilons 0.1 0.2 0.3 0.4 0.6 --vary rule=random_sign
one apart --epsilons 0.1 0.2 0.4
one sam --vary rho=0.1,0.2,0.4
one sam_on --vary rho=0.05,0.1,0.2
one momentum_sam --vary rho=0.2,0.4,0.8,3.2
one ghost_noise --vary ghost-size=4,8,16
one plain --vary label-smoothing=0.1,0.2
one plain --vary weight-decay=0.002,0.005,0.01,0.02
one one_pass --epsilons 0.2 --vary weight-decay=0.002,0.005,0.01 --rule sign
one one_pass --epsilons 0.4 --vary rule=random_sign weight-decay=0.002,0.005,0.01
hundred() { sweep cifar100 80 --factors 1 --methods "$@"; }
one one_pass --epsilons 0.3 --vary rule=blended
one one_pass --epsilons 0.4 --vary epsilon-schedule=rising --rule sign
hundred one_pass --epsilons 0 0.1 --seeds 1 --rule sign
hundred one_pass --epsilons 0.2 --seeds 1 --vary rule=random_sign
hundred one_pass --epsilons 0.3 --seeds 1 --vary rule=random_sign weight-decay=0.005
hundred ghost_noise --seeds 1 --vary ghost-size=8
# what was chosen, and the controls, with three seeds or five
three() { sweep cifar10 40 --seeds 3 --methods "$@"; }
three plain --factors 2
three plain --factors 1 --vary epochs=20
three plain --factors 1 --vary weight-decay=0.005
three one_pass --factors 1 --epsilons 0 --rule sign
three one_pass --factors 1 --epsilons 0.2 --vary weight-decay=0.005 --rule sign
three apart --epsilons 0.2
three one_pass --factors 1 --epsilons 0.2 --vary rule=standardised
three sam --vary rho=0.2
three sam_on --vary rho=0.1
three momentum_sam --factors 1 --vary rho=1.6
five() { sweep cifar10 40 --factors 1 --seeds 5 --methods "$@"; }
five plain
five plain --vary weight-decay=0.01
five one_pass --epsilons 0.2 --rule sign
five ghost_noise --vary ghost-size=8
five one_pass --epsilons 0.4 --vary rule=random_sign
five one_pass --epsilons 0.4 --vary rule=random_sign weight-decay=0.005
hundred plain --seeds 3
hundred plain --seeds 3 --vary epochs=40
hundred plain --seeds 1 --vary weight-decay=0.01
hundred plain --seeds 3 --vary weight-decay=0.005
hundred one_pass --epsilons 0.2 0.3 --seeds 3 --rule sign
hundred one_pass --epsilons 0.3 0.4 --seeds 3 --vary rule=random_sign
# with crops and flips, and with all images but 5,000 for validation
augmented() { python -m experiments sweep $B --data cifar10 --epochs 120 --factors 1 --out runs/cifar10-augmented --methods "$@"; }
augmented one_pass --epsilons 0.1 --seeds 1 --rule sign
augmented one_pass --epsilons 0.2 --seeds 1 --vary rule=random_sign
augmented ghost_noise --seeds 1 --vary ghost-size=16
augmented plain --seeds 1 --vary weight-decay=0.005
augmented plain --seeds 3
augmented plain --seeds 3 --vary weight-decay=0.002
augmented one_pass --epsilons 0.05 --seeds 3 --rule sign
augmented one_pass --epsilons 0.1 --seeds 3 --vary rule=random_sign
augmented one_pass --epsilons 0.1 --seeds 3 --vary rule=random_sign weight-decay=0.002
whole() { python -m experiments sweep $B --data cifar10 --train-samples None --validation-samples 5000 --epochs 30 --factors 1 \
    --seeds 2 --out runs/cifar10-all --methods "$@"; }
whole plain
whole one_pass --epsilons 0.05 --rule sign
whole one_pass --epsilons 0.1 --vary rule=random_sign
python -m experiments evidence runs/cifar10-5k runs/cifar10-augmented runs/cifar10-all runs/cifar100-5k --errors-only --out results

# digits: five splits, five seeds on each
of_digits() { python -m experiments sweep --data digits --seeds 5 --together 5 --epochs 120 --evaluate-every 60 \
    --out runs/digits-splits "$@"; }
S=split-seed=0,1,2,3,4
of_digits --methods plain one_pass --factors 1 --epsilons 0 0.1 0.2 0.4 --vary $S --rule sign
of_digits --methods plain --factors 2 --vary $S
of_digits --methods apart --epsilons 0.1 0.2 --vary $S
of_digits --methods sam --vary $S rho=0.4,0.8
of_digits --methods sam_on --vary $S rho=0.1,0.2,0.4
of_digits --methods momentum_sam --factors 1 --vary $S rho=0.1,0.2,0.4,0.8,1.6
of_digits --methods ghost_noise --factors 1 --vary $S ghost-size=8,16
of_digits --methods plain --factors 1 --vary $S label-smoothing=0.05,0.1,0.2
of_digits --methods plain --factors 1 --vary $S weight-decay=0.001,0.002,0.004
of_digits --methods one_pass --factors 1 --epsilons 0.2 0.4 0.6 --vary $S rule=random_sign
of_digits --methods one_pass --factors 1 --epsilons 0.4 --vary $S rule=random_sign weight-decay=0.001,0.002,0.004
of_digits --methods one_pass --factors 1 --epsilons 0.2 --vary $S carry=all --rule sign
of_digits --methods one_pass --factors 1 --epsilons 0.2 0.4 --vary $S rule=blended
of_digits --methods one_pass --factors 1 --epsilons 0.1 0.2 --vary $S rule=standardised
of_digits --methods one_pass --factors 1 --epsilons 0.4 --vary $S epsilon-schedule=falling,late,rising --rule sign
python -m experiments evidence runs/digits-splits --errors-only --out results

# digits-signs: one split, twenty seeds; written as digits-evidence.json and renamed
python -m experiments sweep --data digits --epochs 120 --evaluate-every 120 --together 10 --seeds 20 --factors 1 \
    --out runs/digits-signs --methods plain one_pass --epsilons 0.2 --rule sign
python -m experiments sweep --data digits --epochs 120 --evaluate-every 120 --together 10 --seeds 20 --factors 1 \
    --out runs/digits-signs --methods one_pass --epsilons 0.2 0.4 --vary rule=random_sign
python -m experiments evidence runs/digits-signs --evaluate --samples 600 --out runs/evidence

# digits-tuned: one grid of weight decay for all; seed 0 chooses (plain training without smoothing has all seeds), then all
# seeds of what was chosen; written as digits-evidence.json and renamed
tuned() { python -m experiments sweep --data digits --epochs 120 --evaluate-every 120 --factors 1 \
    --out runs/digits-tuned "$@"; }
G="$S weight-decay=0.002,0.004,0.008,0.016,0.032,0.064"
tuned --seeds 5 --together 5 --methods plain --vary $G
tuned --seeds 1 --methods plain --vary $G label-smoothing=0.1
tuned --seeds 1 --methods one_pass --epsilons 0.2 0.4 --vary $G
tuned --seeds 1 --methods ghost_noise --vary $G ghost-size=8,16
tuned --seeds 1 --methods apart --epsilons 0.1 0.2 --vary $G
tuned --seeds 1 --methods sam --vary $G rho=0.4,0.8
tuned --seeds 5 --methods one_pass --epsilons 0.2 --vary $S weight-decay=0.008
tuned --seeds 5 --methods ghost_noise --vary $S weight-decay=0.032 ghost-size=16
tuned --seeds 5 --methods apart --epsilons 0.2 --vary $S weight-decay=0.016
tuned --seeds 5 --methods sam --vary $S weight-decay=0.008 rho=0.4
python -m experiments evidence runs/digits-tuned --evaluate --samples 600 --out runs/evidence

python -m experiments appendix results --picture digits-tuned
