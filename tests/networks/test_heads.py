"""Laws of heads and encoders: shared equals repeated, g starts at zero, circles close, features are tamed."""

import math

import numpy as np
import pytest
import torch
from sklearn.preprocessing import QuantileTransformer
from torch import Tensor, nn

from energyreg.networks import heads
from energyreg.networks.encoders import QuantileNormalizer, TableEncoder, TwinEncoder
from energyreg.networks.heads import EdgeHead, JointHead, SelfNormalisedHead, SeparableHead, TargetEmbedding

HEADS = [SeparableHead, JointHead]
ROWS, CHANNELS = 4, 6


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _head(kind: type, dim: int = 1, periodic: list[bool] | None = None, *, at_start: bool = False) -> nn.Module:
    torch.manual_seed(0)
    head = kind(context_dim=CHANNELS, dim=dim, periodic=periodic, width=16, num_frequencies=5).double()
    if not at_start:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.5)
    return head


def _context() -> Tensor:
    return torch.randn(ROWS, CHANNELS, generator=_generator(), dtype=torch.float64)


def _v(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=_generator(1), dtype=torch.float64) - 1


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dim", "periodic"), [(1, None), (2, None), (1, [True]), (2, [False, True])])
def test_targets_shared_by_all_rows_equal_expanded_ones(kind: type, dim: int, periodic: list[bool] | None) -> None:
    head, context, v = _head(kind, dim, periodic), _context(), _v(9, 1, dim)
    shared = head(context, v)
    assert shared.shape == (9, ROWS)
    torch.testing.assert_close(shared, head(context, v.expand(-1, ROWS, -1)))
    # Row by row too: no row sees another.
    torch.testing.assert_close(shared, torch.cat([head(row[None], v) for row in context], 1))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dim", [1, 2])
def test_any_leading_shape(kind: type, dim: int) -> None:
    head, context, v = _head(kind, dim), _context(), _v(2, 3, ROWS, dim)
    g = head(context, v)
    assert g.shape == (2, 3, ROWS)
    torch.testing.assert_close(g[1, 2], head(context, v[1, 2]))
    assert head(context, v[0, 0, :1]).shape == (ROWS,)
    assert head(context, v[:, :, :1]).shape == (2, 3, ROWS)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dim", [1, 2])
def test_g_is_zero_at_the_start(kind: type, dim: int) -> None:
    head, context = _head(kind, dim, at_start=True), _context()
    assert (head(context, _v(9, 1, dim)) == 0).all()
    assert (head(context, _v(9, ROWS, dim)) == 0).all()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dim", "periodic"), [(1, None), (2, None), (2, [False, True])])
def test_gradients_reach_every_parameter_after_one_step(kind: type, dim: int, periodic: list[bool] | None) -> None:
    head, context, v = _head(kind, dim, periodic, at_start=True), _context(), _v(9, ROWS, dim)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        head(context, v).square().add(head(context, v) * torch.randn(9, ROWS, generator=_generator(2))).sum().backward()
        optimizer.step()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dim", "periodic"), [(1, [True]), (2, [False, True]), (2, [True, True])])
def test_periodic_heads_have_no_seam(kind: type, dim: int, periodic: list[bool]) -> None:
    head, context = _head(kind, dim, periodic), _context()
    for d, angle in enumerate(periodic):
        if not angle:
            continue
        start, end = _v(5, 1, dim), _v(5, 1, dim)
        start[..., d], end[..., d] = -1, 1
        start.requires_grad_()
        end.requires_grad_()
        g_start, g_end = head(context, start), head(context, end)
        # Harmonics are kept in single precision, π to 1e-7, and these random weights give slopes up to 1e3.
        torch.testing.assert_close(g_start, g_end, rtol=0, atol=1e-4)
        (slope_start,) = torch.autograd.grad(g_start.sum(), start)
        (slope_end,) = torch.autograd.grad(g_end.sum(), end)
        torch.testing.assert_close(slope_start, slope_end, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_on_the_line_is_not_periodic(kind: type) -> None:
    head, context = _head(kind), _context()
    ends = torch.tensor([[[-1.0]], [[1.0]]], dtype=torch.float64)
    g = head(context, ends)
    assert not torch.allclose(g[0], g[1], atol=1e-3)


def test_separable_head_is_an_inner_product() -> None:
    head, context, v = _head(SeparableHead), _context(), _v(50, 1, 1)
    g = head(context, v)
    b = head(torch.zeros(ROWS, CHANNELS, dtype=torch.float64), v)
    # g is affine in a(context), which is affine in the context.
    torch.testing.assert_close(head(2 * context, v) - b, 2 * (g - b))


def test_embedding_features() -> None:
    embedding = TargetEmbedding(dim=2, periodic=[False, True], num_frequencies=3)
    v = torch.tensor([[0.25, 0.5]])
    features = embedding(v)
    assert features.shape == (1, embedding.out_features)
    phase = torch.stack([0.25 * embedding.frequencies[0], 0.5 * math.pi * torch.tensor([1.0, 2.0, 3.0])])
    torch.testing.assert_close(
        features[0], torch.cat([torch.tensor([0.25, 0.0]), phase.sin().flatten(), phase.cos().flatten()])
    )


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", ["context_dim", "dim", "width", "num_frequencies"])
def test_sizes_below_one_are_refused(kind: type, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; expected a whole number of at least 1"):
        kind(**({"context_dim": 2} | {name: 0}))


def test_depth_and_channels_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="channels is 0"):
        SeparableHead(context_dim=2, channels=0)
    with pytest.raises(ValueError, match="depth is 0"):
        JointHead(context_dim=2, depth=0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_joint_head_in_blocks_equals_itself_in_one(monkeypatch, shared: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(heads, "BLOCK_FLOATS", 3 * ROWS * 16)  # three points of each row, so that the last is ragged
    head = _head(JointHead, 2).to(dtype)
    context = _context().to(dtype).requires_grad_()
    v, weights = _v(5, 10, 1 if shared else ROWS, 2).to(dtype), torch.randn(5, 10, ROWS, dtype=dtype)
    results = []
    for blocks in (True, False):
        head.blocks = blocks
        g = head(context, v)
        assert ("_ResidualNetwork" in _history(g.grad_fn)) == blocks
        results.append([g, *torch.autograd.grad((g * weights).sum(), [context, *head.parameters()])])
        with torch.no_grad():
            torch.testing.assert_close(head(context, v), g)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10 if dtype == torch.float64 else 1e-4, atol=1e-5)


def test_joint_head_in_blocks_leaves_derivatives_in_y_to_autograd(monkeypatch) -> None:
    monkeypatch.setattr(heads, "BLOCK_FLOATS", 1)
    head, v = _head(JointHead), _v(3, ROWS, 1).requires_grad_()
    (slope,) = torch.autograd.grad(head(_context(), v).sum(), v, create_graph=True)
    slope.square().sum().backward()  # as score matching does
    assert all(p.grad is not None for p in head.layers.parameters())


def test_joint_head_in_blocks_serves_vmap(monkeypatch) -> None:
    monkeypatch.setattr(heads, "BLOCK_FLOATS", 1)
    head, v = _head(JointHead), _v(7, ROWS, 1)
    contexts = torch.stack([_context(), 2 * _context()])
    together = torch.func.vmap(head, in_dims=(0, None))(contexts, v)
    torch.testing.assert_close(together, torch.stack([head(context, v) for context in contexts]))


def _history(node) -> str:
    """Names of all functions behind a tensor."""
    return "" if node is None else " ".join([node.name(), *(_history(parent) for parent, _ in node.next_functions)])


@pytest.mark.parametrize("dim", [1, 2])
def test_own_and_shared_targets_in_one_pass_equal_two(dim: int) -> None:
    head, context = _head(SeparableHead, dim), _context()
    own, shared = _v(ROWS, dim), _v(9, 1, dim)
    g_own, g_shared = head.own_and_shared(context, own, shared)
    torch.testing.assert_close(g_own, head(context, own))
    torch.testing.assert_close(g_shared, head(context, shared))


def _fitted(x: Tensor, num_quantiles: int = 257) -> QuantileNormalizer:
    normalizer = QuantileNormalizer(x.shape[1], num_quantiles)
    normalizer.fit(x)
    return normalizer


def test_scores_agree_with_those_of_scikit_learn() -> None:
    x = torch.randn(20_000, 2, generator=_generator()).double()  # enough for a knot at each of 257 quantiles
    x = torch.stack([x[:, 0].exp(), x[:, 1] ** 3], 1)
    theirs = QuantileTransformer(n_quantiles=257, output_distribution="normal", subsample=None)
    theirs = theirs.fit(x.numpy()).transform(x.numpy())
    ours = _fitted(x)(x).numpy()
    # Theirs interpolates levels k / 256 and cuts at 5.2, ours (k + 1/2) / 257: they differ by 1 / 514 in level at
    # most, hence in the score by 0.002 / φ, 0.02 within ±1.6.
    inside = np.abs(theirs) < 1.6
    assert np.abs(ours - theirs)[inside].max() < 0.02
    assert np.abs(ours - theirs)[np.abs(theirs) < 2.4].max() < 0.15


@pytest.mark.parametrize("num_rows", [2, 10, 1000])
def test_normalizer_is_monotone_and_bounded(num_rows: int) -> None:
    x = (5 * torch.randn(num_rows, 3, generator=_generator())).round()
    normalizer = _fitted(x)
    grid = torch.cat(
        [torch.tensor([-torch.inf, -1e30]), torch.linspace(-30, 30, 2001), torch.tensor([1e30, torch.inf])]
    )
    scores = normalizer(grid[:, None].expand(-1, 3))
    assert (scores.diff(dim=0) >= 0).all()
    bound = torch.special.ndtri(torch.tensor(1 - 0.5 / 257))
    torch.testing.assert_close(scores[0], -bound.expand(3), rtol=1e-4, atol=0)
    torch.testing.assert_close(scores[-1], bound.expand(3), rtol=1e-4, atol=0)


def test_ties_go_to_the_middle_of_their_ranks() -> None:
    x = torch.tensor([0.0] * 250 + [1.0] * 500 + [2.0] * 250)[:, None]
    scores = _fitted(x)(torch.tensor([[0.0], [1.0], [2.0]]))[:, 0]
    # Middle levels 1/8, 1/2 and 7/8, to a knot of 257.
    expected = torch.special.ndtri(torch.tensor([0.125, 0.5, 0.875]))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1 / 257 / 0.2)
    assert scores[1].abs() < 0.01


def test_a_constant_feature_becomes_zero() -> None:
    x = torch.stack([torch.full((50,), 7.3), torch.arange(50.0)], 1)
    scores = _fitted(x)(x)
    torch.testing.assert_close(scores[:, 0], torch.zeros(50), rtol=0, atol=1e-6)
    assert scores[:, 1].unique().numel() == 50


def test_normalizer_keeps_to_its_columns() -> None:
    x = torch.randn(100, 3, generator=_generator())
    scores = _fitted(x)(x)
    for column in range(3):
        torch.testing.assert_close(scores[:, [column]], _fitted(x[:, [column]])(x[:, [column]]), rtol=0, atol=0)


def test_normalizer_says_whether_it_is_fitted() -> None:
    normalizer = QuantileNormalizer(1)
    assert not normalizer.fitted
    normalizer.fit(torch.rand(10, 1))
    assert normalizer.fitted


@pytest.mark.parametrize("num_frequencies", [0, 4])
def test_table_encoder_gives_contexts_and_gradients(num_frequencies: int) -> None:
    torch.manual_seed(0)
    encoder, x = (
        TableEncoder(3, context_dim=8, depth=2, dropout=0.0, num_frequencies=num_frequencies),
        torch.randn(20, 3),
    )
    encoder.fit(x)
    assert encoder.fitted
    context = encoder(x)
    assert context.shape == (20, 8)
    context.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.numel():
            assert parameter.grad.abs().sum() > 0, name


def test_no_feature_value_drives_the_encoder_far() -> None:
    torch.manual_seed(0)
    encoder, x = TableEncoder(2, context_dim=8).eval(), torch.randn(200, 2)
    encoder.fit(x)
    wild = encoder(torch.tensor([[1e30, -1e30]]))
    edge = encoder(torch.stack([x[:, 0].max(), x[:, 1].min()])[None])
    torch.testing.assert_close(wild, edge)


def test_dropout_is_for_training_alone() -> None:
    torch.manual_seed(0)
    encoder, x = TableEncoder(2, context_dim=32, dropout=0.5), torch.randn(10, 2)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_wrong_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\); this encoder takes \(B, 2\)"):
        TableEncoder(2)(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features is 0"),
        ({"num_features": 2, "context_dim": 0}, "context_dim is 0"),
        ({"num_features": 2, "depth": 0}, "depth is 0"),
        ({"num_features": 2, "num_frequencies": -1}, "num_frequencies is -1"),
        ({"num_features": 2, "dropout": 1.0}, "dropout is 1.0"),
        ({"num_features": 2, "dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_wrong_arguments_of_the_encoder_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableEncoder(**arguments)


def test_wrong_arguments_of_the_normalizer_are_refused() -> None:
    with pytest.raises(ValueError, match="num_features is 0"):
        QuantileNormalizer(0)
    with pytest.raises(ValueError, match="num_quantiles is 1"):
        QuantileNormalizer(2, 1)


# A head with a learned log-normaliser, and two encoders in one ------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dim", "periodic"), [(1, None), (2, [False, True])])
def test_self_normalised_head_is_its_head_minus_a_number_of_the_context(
    kind: type, dim: int, periodic: list[bool] | None
) -> None:
    inner = _head(kind, dim, periodic)
    head, context = SelfNormalisedHead(inner, CHANNELS).double(), _context()
    for v in (_v(9, 1, dim), _v(9, ROWS, dim), _v(2, 3, ROWS, dim), _v(ROWS, dim)):
        assert torch.equal(head(context, v), inner(context, v))  # b = 0 at the start
    nn.init.normal_(head.log_normaliser.weight)
    nn.init.normal_(head.log_normaliser.bias)
    for v in (_v(9, 1, dim), _v(9, ROWS, dim), _v(2, 3, ROWS, dim), _v(ROWS, dim)):
        difference = inner(context, v) - head(context, v)
        expected = context @ head.log_normaliser.weight[0] + head.log_normaliser.bias
        torch.testing.assert_close(difference, expected.expand(difference.shape))
    assert expected.std() > 0.1
    for shared in (False, True):
        assert head.floats_per_point(shared) == inner.floats_per_point(shared) + 1
    assert SelfNormalisedHead(nn.Identity(), 3).floats_per_point(True) > 1  # any module is a head
    for name, parameter in head.named_parameters():
        (gradient,) = torch.autograd.grad(head(context, _v(9, ROWS, dim)).square().sum(), parameter, allow_unused=True)
        assert gradient is not None or "frequencies" in name, name


def test_wrong_arguments_of_the_self_normalised_head_are_refused() -> None:
    with pytest.raises(ValueError, match="context_dim is 0"):
        SelfNormalisedHead(_head(SeparableHead), 0)


def test_twin_encoder_is_both_encoders() -> None:
    torch.manual_seed(0)
    first, second = TableEncoder(3, 5, dropout=0.0), TableEncoder(3, 4, dropout=0.0)
    twin, x = TwinEncoder(first, second), torch.randn(20, 3)
    assert not bool(twin.fitted)
    first.fit(2 * x + 1)
    assert not bool(twin.fitted)
    knots = first.normalizer.knots.clone()
    twin.fit(x)
    assert bool(twin.fitted)
    assert torch.equal(first.normalizer.knots, knots)  # what is fitted stays
    assert twin.num_features == 3
    context = twin(x)
    assert context.shape == (20, 9)
    head, proposal = twin.split(context)
    assert torch.equal(head, first(x)) and torch.equal(proposal, second(x))
    # Rows of a context that was kept are split alike.
    some = twin.split(context[5:7])
    assert torch.equal(some[0], head[5:7]) and torch.equal(some[1], proposal[5:7])


def test_twin_encoder_takes_any_module() -> None:
    twin = TwinEncoder(nn.Linear(3, 5), nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    twin.fit(torch.randn(4, 3))
    assert twin.fitted and not hasattr(twin, "num_features")
    assert [part.shape[1] for part in twin.split(twin(torch.randn(4, 3)))] == [5, 4]


def _edges(*, at_start: bool = False, **arguments: object) -> EdgeHead:
    torch.manual_seed(0)
    head = EdgeHead(CHANNELS, num_edges=7, **arguments).double()
    if not at_start:
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.5)
    return head


def test_edges_for_shared_targets_equal_expanded_ones_and_rows_do_not_see_each_other() -> None:
    head, context, v = _edges(), _context(), _v(9, 1, 1)
    shared = head(context, v)
    torch.testing.assert_close(shared, head(context, v.expand(-1, ROWS, -1)))
    torch.testing.assert_close(shared, torch.cat([head(row[None], v) for row in context], 1))
    assert head(context, _v(2, 3, ROWS, 1)).shape == (2, 3, ROWS)


def test_edges_start_at_zero_and_every_parameter_learns() -> None:
    head = _edges(at_start=True)
    assert (head(_context(), _v(9, 1, 1)) == 0).all()
    learned = _edges(head=SeparableHead(CHANNELS).double())
    learned(_context(), _v(9, 1, 1)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in learned.parameters())


def test_edges_are_soft_steps_where_they_say() -> None:
    head = EdgeHead(1, num_edges=1).double()
    with torch.no_grad():  # place .3 x, slope 50, height 2
        head.output.weight.copy_(torch.tensor([[0.3], [0.0], [0.0]]))
        head.output.bias.copy_(torch.tensor([0.0, math.log(50.0), 2.0]))
    context, v = torch.tensor([[1.0], [-2.0]], dtype=torch.float64), _v(50, 1, 1)
    expected = 2 * torch.tanh(50 * (v[..., 0] - torch.tensor([0.3, -0.6])))
    torch.testing.assert_close(head(context, v), expected)


def test_edges_add_to_another_head() -> None:
    other = _head(SeparableHead)
    both, alone = _edges(head=other), _edges()
    both.output.load_state_dict(alone.output.state_dict())
    context, v = _context(), _v(9, 1, 1)
    torch.testing.assert_close(both(context, v), alone(context, v) + other(context, v))
    assert both.floats_per_point(True) > alone.floats_per_point(True)


def test_edges_stay_finite_whatever_the_slope() -> None:
    head = EdgeHead(1, num_edges=1)
    with torch.no_grad():
        head.output.bias.copy_(torch.tensor([0.0, 1e4, 1.0]))
    assert head(torch.zeros(1, 1), torch.linspace(-1, 1, 5)[:, None, None]).isfinite().all()


def test_edges_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="num_edges is 0"):
        EdgeHead(CHANNELS, num_edges=0)
    with pytest.raises(ValueError, match="slope is -1"):
        EdgeHead(CHANNELS, slope=-1.0)
    with pytest.raises(ValueError, match="v has 2 dimensions"):
        EdgeHead(CHANNELS)(torch.zeros(1, CHANNELS), torch.zeros(3, 1, 2))


def test_few_rows_give_a_smooth_map() -> None:
    # The slope of the map against that of the true one, for normal scores of normal numbers: identity. With a knot for
    # every eight rows it varies by 1 / sqrt(8) = 35 %; with one for every 64 by an eighth, less what the curve smooths.
    x = torch.randn(2000, 1, generator=_generator(), dtype=torch.float64)
    normalizer = QuantileNormalizer(1).double()
    normalizer.fit(x)
    grid = torch.linspace(-1.2, 1.2, 400, dtype=torch.float64)[:, None]
    slope = normalizer(grid).diff(dim=0) / grid.diff(dim=0)
    assert slope.std() < 0.2
    assert (slope > 0).all()


@pytest.mark.parametrize("rows", [2, 9, 64, 700])
def test_the_curve_through_few_quantiles_ascends_and_keeps_the_ends(rows: int) -> None:
    x = torch.randn(rows, 2, generator=_generator(), dtype=torch.float64).exp()
    normalizer = QuantileNormalizer(2).double()
    normalizer.fit(x)
    assert (normalizer.knots.diff(dim=1) >= 0).all()
    torch.testing.assert_close(normalizer.knots[:, 0], x.amin(0))
    torch.testing.assert_close(normalizer.knots[:, -1], x.amax(0))
