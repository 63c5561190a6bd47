"""Searches: optuna proposes values by the results of those before; its storage is a journal of JSON lines."""

import math
from typing import Any

from lcx.errors import UserError
from lcx.sweeps.expand import Trial, rounded_value, with_values
from lcx.sweeps.folder import Folder
from lcx.sweeps.spec import Range, Sweep


class Searched:
    """The trials of a search: so many for each point, each point with a study of its own.

    What a killed sweep had proposed is taken up first, so that no proposal is lost and none is made twice.
    """

    def __init__(self, sweep: Sweep, trials: list[Trial], folder: Folder):
        """Raises UserError where optuna is not installed."""
        try:
            import optuna
        except ImportError:
            raise UserError("a search needs optuna: pip install 'lcx[sweep]'.") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._search, self._points = optuna, sweep.search, {trial.name: trial for trial in trials}
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder.study)))
        self._studies = {
            name: optuna.create_study(storage=storage, study_name=name, direction=sweep.goal, load_if_exists=True)
            for name in self._points
        }
        self._distributions = {key: _distribution(optuna, space) for key, space in self._search.space.items()}
        self._proposed: dict[str, tuple[str, Any]] = {}  # name of a run: (point, optuna's trial)
        self._again = [(name, past) for name, study in self._studies.items() for past in study.trials]

    def take(self) -> Trial | None:
        if self._again:
            name, past = self._again.pop(0)
            if past.state == self._optuna.trial.TrialState.FAIL:
                return self.take()
            return self._run_of(name, past)
        # The point with the fewest proposals: all searches go on side by side.
        name, study = min(self._studies.items(), key=lambda pair: len(pair[1].trials))
        number = len(study.trials)
        if number >= self._search.trials:
            return None
        study.sampler = self._sampler(number)
        return self._run_of(name, study.ask(self._distributions))

    def finish(self, trial: Trial, value: float | None) -> None:
        name, proposed = self._proposed.pop(trial.name)
        study, states = self._studies[name], self._optuna.trial.TrialState
        if study.trials[proposed.number].state.is_finished():
            return
        failed = value is None or math.isnan(value)
        study.tell(proposed.number, None if failed else value, states.FAIL if failed else states.COMPLETE)

    def _run_of(self, name: str, proposed: Any) -> Trial:
        values = {key: rounded_value(value) for key, value in proposed.params.items()}
        trial = with_values(self._points[name], values, proposed.number)
        self._proposed[trial.name] = (name, proposed)
        return trial

    def _sampler(self, number: int) -> Any:
        """Seeded by what has been proposed, so that a search that is resumed goes on as one that was not."""
        seed = self._search.seed + number
        samplers = self._optuna.samplers
        made = {"tpe": samplers.TPESampler, "random": samplers.RandomSampler, "gp": samplers.GPSampler}
        return made[self._search.sampler](seed=seed)


def _distribution(optuna: Any, space: Range) -> Any:
    if space.choices:
        return optuna.distributions.CategoricalDistribution(space.choices)
    if space.integer:
        return optuna.distributions.IntDistribution(int(space.low), int(space.high), log=space.log)
    return optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)
