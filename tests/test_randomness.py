"""Random numbers: those of the caller, and of other threads, are nobody's business but theirs."""

import contextlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import energyreg as er
from energyreg import randomness
from energyreg.densities.mixtures import draw
from energyreg.evaluation import metrics
from energyreg.randomness import RandomSource, draws_by_itself

pytestmark = pytest.mark.filterwarnings("ignore:The calibration chose")  # the models are hardly trained
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 2))
Y = X[:, 0] + 0.1 * RNG.normal(size=64)
TENSORS = torch.tensor(X, dtype=torch.float32), torch.tensor(Y, dtype=torch.float32)


class Audit(TorchDispatchMode):
    """Refuses every operation of this thread that would draw from torch's global generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not getattr(result, "is_meta", False):
            generators = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
            assert generators and torch.default_generator not in generators, f"{func} draws globally"
        return result


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """A context in which no global random state is read by torch's operations, seeded or set."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a global random state is set")

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        with monkeypatch.context() as patch, Audit():
            patch.setattr(np.random, "seed", refuse)
            patch.setattr(np.random, "set_state", refuse)
            patch.setattr(random, "seed", refuse)
            yield
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]

    yield context


class Own(nn.Module):
    """A caller's network, with what torch and others have of randomness in training."""

    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.attention = nn.Linear(2, 8), nn.Dropout(0.3), nn.MultiheadAttention(8, 2, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.first(x))
        noisy = hidden + 0.1 * torch.randn_like(hidden) * self.training
        return noisy + self.attention(noisy, noisy, noisy, need_weights=False)[0]


class Augmented(Dataset[Any]):
    """Rows with noise that is drawn when they are read."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return TENSORS[0][index] + 0.01 * torch.randn(2), TENSORS[1][index, None]


def estimator(**settings: Any) -> Callable[[], Any]:
    def answer() -> np.ndarray:
        y = np.column_stack([Y, -Y]) if settings.get("outputs") else Y
        model = er.EnergyRegressor(**{"epochs": 2, "width": 8, "n_members": 1, "random_state": 0, **settings})
        return np.asarray(model.fit(X, y).predict(X[:5]))

    return answer


def own_network(loader: Any = None, objective: Any = None, dataset: Any = None) -> Callable[[], Any]:
    def answer() -> Tensor:
        with RandomSource(0).everywhere():
            encoder = Own()
            model = er.EnergyRegressionModel(
                encoder, er.heads.SeparableHead(8), proposal=er.proposals.MixtureDensityNetwork(8)
            )
        data = TENSORS if loader is None else (loader(),)
        er.fit(model, *data, objective=objective, epochs=2, seed=3, validation=None)
        return model.state_dict()["encoder.first.weight"].clone()

    return answer


def ensemble_of_own_networks() -> Tensor:
    def build() -> er.EnergyRegressionModel:
        return er.EnergyRegressionModel(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3)), er.heads.SeparableHead(8))

    return er.fit_ensemble(build, *TENSORS, n_members=2, epochs=2)(TENSORS[0][:5]).mean


FITS: dict[str, Callable[[], Any]] = {
    "estimator": estimator(),
    "ensemble": estimator(n_members=2, dropout=0.2),
    "chain": estimator(outputs="chain", dropout=0.2),
    "joint": estimator(outputs="joint"),
    "own network": own_network(),
    "own objective": own_network(objective=lambda f, q, z, generator: -q.log_prob(z) + 0 * torch.rand(len(z))),
    "learned noise": own_network(objective=er.objectives.NCEWithLearnedProposal(8)),
    "loader": own_network(lambda: DataLoader(TensorDataset(*TENSORS), 16, shuffle=True)),
    "augmenting loader": own_network(lambda: DataLoader(Augmented(), 16, shuffle=True)),
    "ensemble of own networks": ensemble_of_own_networks,
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_touches_no_global_random_state_and_goes_by_its_seed(name: str, audit: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    with audit():
        first = FITS[name]()
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, FITS[name]())


@pytest.mark.parametrize("name", ["estimator", "ensemble", "own network", "augmenting loader"])
def test_fits_in_threads_are_those_alone(name: str) -> None:
    alone = FITS[name]()
    with ThreadPoolExecutor(3) as pool:
        for result in pool.map(lambda _: FITS[name](), range(3)):
            np.testing.assert_array_equal(alone, result)


def test_predictions_files_and_scores_touch_no_global_random_state(audit: Callable[[], Any], tmp_path: Path) -> None:
    with audit():
        model = er.EnergyRegressor(epochs=2, width=8, n_members=2, random_state=0).fit(X, Y)
        model.save(tmp_path / "model")
        loaded = er.EnergyRegressor.load(tmp_path / "model")
        np.testing.assert_array_equal(model.predict(X), loaded.predict(X))
        loaded.sample(X[:3], 4, random_state=0)
        loaded.predict_interval(X[:3])
        loaded.score_samples(X, Y)
        metrics.evaluate(loaded.predict_distribution(X), Y)


def test_distributions_without_generators_draw_from_the_one_given(audit: Callable[[], Any]) -> None:
    q = torch.distributions.Independent(torch.distributions.StudentT(torch.full((4, 1), 3.0)), 1)
    with audit():
        samples = draw(q, 5, torch.Generator().manual_seed(0))
    assert torch.equal(samples, draw(q, 5, torch.Generator().manual_seed(0)))


OPERATIONS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(5),
    "randint": lambda: torch.randint(2, 90, (9,)),
    "randperm": lambda: torch.randperm(20),
    "rand_like": lambda: torch.rand_like(torch.ones(5, dtype=torch.double)),
    "randint_like": lambda: torch.randint_like(torch.ones(20), 2, 30),
    "normal": lambda: torch.normal(torch.zeros(3), torch.ones(3)),
    "dropout": lambda: nn.Dropout(0.3)(torch.ones(40, requires_grad=True)),
    "native_dropout": lambda: torch.native_dropout(torch.ones(40), 0.3, True)[0],
    "alpha_dropout": lambda: nn.AlphaDropout(0.3)(torch.ones(40)),
    "rrelu": lambda: nn.RReLU()(torch.ones(20)),
    "lstm": lambda: nn.LSTM(3, 3, 2, dropout=0.5)(torch.ones(2, 2, 3))[0],
    "pooling": lambda: nn.FractionalMaxPool2d(2, output_size=3)(torch.arange(64.0).view(1, 1, 8, 8)),
    "gamma": lambda: torch.distributions.Gamma(torch.ones(4), 1.0).sample(),
    "binomial": lambda: torch.distributions.Binomial(10, torch.full((20,), 0.3)).sample(),
    "initialisation": lambda: nn.init.trunc_normal_(nn.init.orthogonal_(torch.empty(3, 3))),
    "loader": lambda: next(iter(DataLoader(torch.arange(50), 50, shuffle=True))),  # type: ignore[arg-type]
    "vmap": lambda: torch.func.vmap(torch.rand_like, randomness="different")(torch.ones(2, 3)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_source_has_the_numbers_of_manual_seed(name: str, audit: Callable[[], Any]) -> None:
    torch.manual_seed(5)
    expected = OPERATIONS[name]()
    with audit(), RandomSource(5).everywhere():
        assert torch.equal(OPERATIONS[name](), expected)


def test_workers_of_a_loader_draw_numbers_of_their_own() -> None:
    """A forked worker inherits the redirection; were it in force there, all workers would draw the same."""

    class Numbers(Dataset[Any]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            return torch.rand(2)

    source = RandomSource(0)
    with source.in_use():
        first = list(randomness.redirected_items(DataLoader(Numbers(), None, num_workers=2)))
        source.seed(0)
        again = list(randomness.redirected_items(DataLoader(Numbers(), None, num_workers=2)))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.stack(first), torch.stack(again))


def test_gradient_checkpoints_repeat_their_numbers() -> None:
    """What is computed again in the backward pass has the dropout of the forward pass."""
    x = torch.ones(200, requires_grad=True)
    with RandomSource(0).everywhere():
        value = checkpoint(nn.Dropout(0.5), x, use_reentrant=False)
        kept = value.detach() > 0
    value.sum().backward()
    assert x.grad is not None and torch.equal(x.grad > 0, kept)


def test_only_modules_that_may_draw_are_redirected() -> None:
    quiet = er.EnergyRegressionModel.mixture_for_table(2, width=8, dropout=0.3)
    assert not draws_by_itself(
        quiet, er.objectives.ExactMaximumLikelihood(), nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Conv2d(1, 1, 1))
    )
    for drawing in (nn.Dropout(0.1), nn.Sequential(nn.Linear(2, 2), nn.Dropout1d()), nn.RReLU(), Own(), nn.LSTM(2, 2),
                    nn.TransformerEncoderLayer(4, 2), lambda f, q, z, generator: z.sum(1)):  # fmt: skip
        assert draws_by_itself(drawing)
