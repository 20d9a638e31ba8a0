"""Leave out channels that a sample does not need.

Before: y = conv(relu(conv(x)))
After:  active = rule(scores(mean(x)));  y = conv(relu(conv(x, only active filters)), only active inputs)

A small predictor looks at what a product reads and decides, for each sample, which blocks of 16 of its output channels
are computed; what reads them reads only those (Elkerdawy et al. 2022, "Fire Together Wire Together", arXiv 2110.08232;
Gao et al. 2019, arXiv 1810.05331, for `predictor=topk`). `keep` is a fixed share of the blocks, `mass` as many as hold
that share of the heat (see `targets`). Predictors are the least squares from pooled inputs to targets (`following`);
`fit-steps` trains the network for them, with `joint` both through straight-through gradients. `form` says how
the rest is left out (see `forms`): `auto` measures. Channels that are hot together are put beside each other.

Declines what meets other channels on its way: residual sums, concatenations, groups, outputs of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from torch import Tensor

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.data.dataset import Sample
from graphopt.edit import Edit, GraphEditor
from graphopt.errors import UsageError
from graphopt.passes.batch_norm_folding import BatchNormFolding
from graphopt.passes.channel_gating.account import SAMPLES, Active, active_on, count_kept, describe, shares
from graphopt.passes.channel_gating.buckets import BucketWriter
from graphopt.passes.channel_gating.fitting import fit_predictors
from graphopt.passes.channel_gating.following import follow
from graphopt.passes.channel_gating.forms import BlockWriter, GatherWriter, MaskWriter, StaticWriter, Writer
from graphopt.passes.channel_gating.predictor import Kind, Predictor, first_predictor
from graphopt.passes.channel_gating.sites import PRODUCTS, NoSite, Site, find_sites
from graphopt.passes.channel_gating.targets import Seen, block_heat, look, share_of, share_targets
from graphopt.program import Program

Form = Literal["auto", "mask", "gather", "bucket", "block", "static"]
FALLBACK: Form = "block"  # where nothing can be measured: it computes less whatever the number of samples


@dataclass(frozen=True)
class ChannelGating(Pass):
    """Leave out channels that a sample does not need."""

    name = "channel-gating"
    preserves = "approximate"
    keep: float | None = None
    mass: float | None = None
    form: Form = "auto"
    predictor: Kind = "linear"
    fit_steps: int = 0
    joint: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None and self.mass is not None:
            raise UsageError(f"keep={self.keep} and mass={self.mass} exclude each other; give one of them")
        if self.keep is None and self.mass is None:
            object.__setattr__(self, "keep", 0.5)
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"keep={self.keep} must be over 0 and at most 1: the share of blocks that is computed")
        if self.mass is not None and not self.mass > 0:
            raise UsageError(f"mass={self.mass} must be over 0; over 1 keeps every channel")
        if self.predictor == "topk" and self.keep is None:
            raise UsageError("predictor=topk keeps a fixed share of the blocks; give keep instead of mass")
        if self.form == "gather" and self.keep is None:
            raise UsageError("form=gather computes a fixed share of the blocks; give keep instead of mass")
        if self.fit_steps < 0:
            raise UsageError(f"fit-steps={self.fit_steps} must be 0 or more")
        if self.joint and not self.fit_steps:
            raise UsageError("joint=true has no effect with fit-steps=0; give both")
        if self.form == "static" and self.fit_steps:
            raise UsageError(f"form=static decides nothing at run time: fit-steps={self.fit_steps} has no effect")

    def starts_at(self) -> frozenset[Any]:
        return PRODUCTS

    def run(self, program: Program, context: PassContext) -> PassResult:
        folded = PassResult(program) if self.form == "mask" else BatchNormFolding().run(program, context)
        base, notes = folded.program, list[str]()
        sites = sites_of(base, through_norms=self.form == "mask")
        samples = [] if context.data is None else list(islice(context.data.fit, SAMPLES))
        seen = look(base, sites, samples) if samples else {}
        if self.form == "static":
            if not seen and sites:
                raise UsageError("form=static removes channels that no sample needs, but there is no data; give data")
            predictors = {site.name: self.begin(site, None) for site in sites}  # which nothing asks
            return joined(program, folded, self.write(base, context, predictors, self.used(sites, seen)), notes)
        if sites and not seen:
            notes.append("there is no data: all blocks have one score, so that the first ones are kept")
        predictors = {site.name: self.begin(site, seen.get(site.name)) for site in sites}
        targets = {site.name: self.targets(seen[site.name], predictors[site.name], site) for site in sites if seen}
        if seen and not self.keeps_all:
            predictors = follow(base, predictors, targets, samples)
        if self.fit_steps and sites:
            base, predictors, note = fit_predictors(
                base, predictors, context, self.fit_steps, mass=self.mass, joint=self.joint
            )
            notes.append(note)
        written = self.choose(base, context, predictors, notes)
        if seen and written.result.rewrites:
            notes += self.account(base, written, targets, samples)
        return joined(program, folded, written, notes)

    def begin(self, site: Site, seen: Seen | None) -> Predictor:
        """A predictor that nothing has trained."""
        count = None if self.keep is None else count_kept(site, self.keep)
        return first_predictor(site, self.predictor, count, seen, self.mass, in_order=self.keeps_all)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever left out."""
        return self.keep == 1 or (self.mass is not None and self.mass > 1)

    def targets(self, seen: Seen, predictor: Predictor, site: Site) -> Tensor:
        """bool [samples, blocks]."""
        return share_targets(block_heat(seen.heat, predictor.order, site.block), self.mass, predictor.count)

    def used(self, sites: Sequence[Site], seen: Mapping[str, Seen]) -> dict[str, Tensor]:
        """bool [channels] of each site: those that stay for good, a share of them or all that some sample needs."""
        found = {}
        for site in sites:
            heat = seen[site.name].heat
            if self.keep is None:
                found[site.name] = share_targets(heat, self.mass).any(0)
            else:
                count = max(1, round(self.keep * site.channels))
                found[site.name] = share_targets(share_of(heat).mean(0, keepdim=True), count=count)[0]
        return found

    def choose(
        self, base: Program, context: PassContext, predictors: Mapping[str, Predictor], notes: list[str]
    ) -> Written:
        """The form that is asked for, or of those that fit most sites the one that is measured to be the fastest."""
        if self.form != "auto":
            return self.write(base, context, predictors)
        forms: tuple[Form, ...] = ("block", "bucket") if self.keep is None else ("block", "bucket", "gather")
        found = {form: replace(self, form=form).write(base, context, predictors) for form in forms}
        most = max(len(written.result.rewrites) for written in found.values())
        found = {form: written for form, written in found.items() if 0 < len(written.result.rewrites) == most}
        times: dict[Form, float] = {}
        for number, (form, written) in enumerate(found.items()):
            context.progress(f"{self.name}: measuring form={form}", number, len(found))
            timing = context.measure(written.result.program)
            if timing is not None:
                times[form] = timing.seconds
        if not times:
            notes.append(f"nothing was measured: {context.target} is not at hand or no form fits; form={FALLBACK}")
            return replace(self, form=FALLBACK).write(base, context, predictors)
        ungated = context.measure(base)
        chosen = min(times, key=lambda form: times[form])
        each = ", ".join(f"{form} {1e3 * seconds:.3f} ms" for form, seconds in times.items())
        whole = "" if ungated is None else f"; without gates {1e3 * ungated.seconds:.3f} ms"
        notes.append(f"form={chosen} was measured to be the fastest: {each}{whole}")
        return found[chosen]

    def write(
        self,
        base: Program,
        context: PassContext,
        predictors: Mapping[str, Predictor],
        used: Mapping[str, Tensor] | None = None,
    ) -> Written:
        """The program in this form; `used` is for static."""
        edit = Edit(base, context, self.name)
        active: dict[str, str] = {}
        for editor in list(edit.graphs()):  # without the branches that are added
            writer = self.writer(editor, used)
            for found in list(find_sites(editor, through_norms=self.form == "mask")):
                if isinstance(found, NoSite):
                    record(editor, self.name, found)
                elif editor.path:
                    node = found.producer.node
                    editor.decline(self.name, node, f"{node.name} is in a branch: what is left out is decided outside")
                else:
                    writer.write(found, predictors[found.name])
            active |= writer.active
        return Written(edit.finish(), active)

    def writer(self, editor: GraphEditor, used: Mapping[str, Tensor] | None) -> Writer:
        if used is not None:
            return StaticWriter(editor, self.name, used)
        kind = {"mask": MaskWriter, "block": BlockWriter, "gather": GatherWriter, "bucket": BucketWriter}[self.form]
        return kind(editor, self.name)

    def account(self, base: Program, written: Written, targets: Active, samples: Sequence[Sample]) -> list[str]:
        """What targets and predictors leave to be computed on the samples, and how often they agree."""
        sites = [site for site in sites_of(base, through_norms=True) if site.name in written.active]
        if not sites:
            return []
        wanted = {site.name: targets[site.name] for site in sites}
        found = active_on(written.result.program, written.active, samples)
        equal = [float((found[name] == wanted[name]).double().mean()) for name in found]
        agreement = f"predictors agree with their targets on {sum(equal) / len(equal):.1%} of the blocks"
        return [
            *describe(sites, shares(base, sites, wanted), "estimated before training"),
            *describe(sites, shares(base, sites, found), "measured on the data for fitting"),
            agreement,
        ]


@dataclass(frozen=True)
class Written:
    """A program in some form, and the nodes that decide, by site."""

    result: PassResult
    active: Mapping[str, str] = field(default_factory=dict)


def sites_of(program: Program, *, through_norms: bool) -> list[Site]:
    """The sites of the main graph, as `find_sites` finds them."""
    (editor,) = [item for item in Edit(program, PassContext(), ChannelGating.name).graphs() if not item.path]
    return [found for found in find_sites(editor, through_norms=through_norms) if isinstance(found, Site)]


def record(editor: GraphEditor, rule: str, found: NoSite) -> None:
    """Why a product is no site."""
    if found.nearly:
        editor.near_miss(rule, found.producer, found.reason, 1, 2)
    else:
        editor.decline(rule, found.producer, found.reason)


def joined(program: Program, folded: PassResult, written: Written, notes: Sequence[str]) -> PassResult:
    """The account of both steps; folded norms alone are not what was asked for."""
    result = written.result
    if not result.rewrites:
        return replace(result, program=program, notes=(*result.notes, *notes))
    return replace(
        result,
        rewrites=(*folded.rewrites, *result.rewrites),
        declined=(*folded.declined, *result.declined),
        instances=(*folded.instances, *result.instances),
        notes=(*result.notes, *notes),
    )
