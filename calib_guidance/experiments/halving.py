"""Successive halving: measure all settings on few samples, and spend more on the best alone (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from calib_guidance.errors import ConfigurationError

try:
    import optuna
except ImportError as error:
    raise ConfigurationError(
        "halving is done by Optuna, which is not installed: pip install 'calib_guidance[sweep]', or take halving out of the sweep"
    ) from error


class BestFraction(optuna.pruners.BasePruner):
    """Ends all trials of a rung but the best, once every trial of the rung has reported.

    Optuna's own SuccessiveHalvingPruner decides on a trial the moment that it reports, by those that happened to come before:
    what goes on would depend on which run ends first, and the first one always would. Here runs can be gone on with later, so
    that nothing has to be decided before all of a rung is known.

    Args:
        factor: one in so many goes on, and at least one.
    """

    def __init__(self, factor: int):
        self.factor = factor

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial is not among the best at the step that it has reported last; the lowest value is best."""
        step = trial.last_step
        trials = study.get_trials(deepcopy=False)
        reported = sorted(t.intermediate_values[step] for t in trials if step in t.intermediate_values)
        return trial.intermediate_values[step] > reported[max(1, len(reported) // self.factor) - 1]


def halve(
    settings: Sequence[Mapping[str, str]],
    rungs: Sequence[int],
    factor: int,
    measure: Callable[[Sequence[int], int], Sequence[float]],
) -> tuple[list[int], optuna.Study]:
    """Measure settings with more and more samples, fewer and fewer of them.

    Args:
        settings: parameters of each, by name.
        rungs: samples of each round, ascending.
        factor: one in so many settings goes on to the next round.
        measure: given the settings of a round, by number, and its samples, what each is ranked by; the lowest is best.

    Returns:
        Of each setting the number of samples that it got, and the study: a trial for each setting, with what it was ranked by at
        each rung. Those that got all samples are complete, the others pruned.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = {key: list(dict.fromkeys(setting[key] for setting in settings)) for key in settings[0]}
    space = {key: optuna.distributions.CategoricalDistribution(values) for key, values in names.items()}
    study = optuna.create_study(direction="minimize", pruner=BestFraction(factor))
    for setting in settings:
        study.enqueue_trial(dict(setting))
    trials = [study.ask(space) for _ in settings]
    samples, alive = [0] * len(settings), list(range(len(settings)))
    for rung in rungs:
        values = dict(zip(alive, measure(alive, rung), strict=True))
        for number, value in values.items():
            samples[number] = rung
            trials[number].report(value, rung)
        if rung != rungs[-1]:
            ended = {number for number in alive if trials[number].should_prune()}
            for number in ended:
                study.tell(trials[number], state=optuna.trial.TrialState.PRUNED)
            alive = [number for number in alive if number not in ended]
    for number in alive:
        study.tell(trials[number], values[number])
    return samples, study
