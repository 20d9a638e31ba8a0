"""The passes. `PASSES` maps a name to where its class is; a new pass is one file, one line here and one test."""

from __future__ import annotations

if __name__ != "graphopt.passes":
    raise ImportError("import graphopt.passes instead of passes: one file must never be two modules")

PASSES = {
    "batch-norm-folding": "graphopt.passes.batch_norm_folding:BatchNormFolding",
    "block-folding": "graphopt.passes.block_folding:BlockFolding",
    "channel-gating": "graphopt.passes.channel_gating:ChannelGating",
    "common-subexpressions": "graphopt.passes.common_subexpressions:CommonSubexpressions",
    "constant-folding": "graphopt.passes.constant_folding:ConstantFolding",
    "dead-code": "graphopt.passes.dead_code:DeadCode",
    "decided-conditions": "graphopt.passes.decided_conditions:DecidedConditions",
    "early-exit": "graphopt.passes.early_exit:EarlyExit",
    "gated-attention": "graphopt.passes.gated_attention:GatedAttention",
    "lut-matmul": "graphopt.passes.lut_matmul:LutMatmul",
    "merge-linears": "graphopt.passes.merge_linears:MergeLinears",
    "mixed-precision": "graphopt.passes.mixed_precision:MixedPrecision",
    "no-op-removal": "graphopt.passes.no_op_removal:NoOpRemoval",
    "qdq-fusion": "graphopt.passes.qdq_fusion:QDQFusion",
    "quantize": "graphopt.passes.quantize:Quantize",
    "scale-folding": "graphopt.passes.scale_folding:ScaleFolding",
}
