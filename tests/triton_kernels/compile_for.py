"""Compiles the Triton kernels for a GPU that need not be there, and reads from the machine code what became of them.

python tests/triton_kernels/compile_for.py 90          # a table for sm_90
python tests/triton_kernels/compile_for.py 80 90 --json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyfast_ppo.backends.triton import _kernels

NETWORK = {"mean_ptr", "std_ptr", "values_ptr", "grad_mean_ptr", "grad_std_ptr", "grad_values_ptr"}
BITS = {"U8": 8, "S8": 8, "U16": 16, "64": 64, "128": 128}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INT_ARGUMENTS = {"coefficient_tensors", "num_rows", "num_original", "num_steps", "num_envs", "num_moments", "size"}


def ppo_loss(num_actions: int, network: str = "fp32", std: str = "[A]", old_std: str = "[N, A]", **options: bool):
    """(kernel, constants, warps, types) of the loss."""
    kernels = _kernels("ppo_loss")
    shape = _kernels("shapes").block_shape(num_actions)
    warps = shape.pop("num_warps")
    constants = dict.fromkeys(("MEAN_STRIDE", "ACTIONS_STRIDE", "OLD_MEAN_STRIDE", "A"), num_actions)
    constants |= {"STD_STRIDE": 0 if std == "[A]" else num_actions, **shape}
    constants |= {"OLD_STD_STRIDE": 0 if old_std == "[A]" else num_actions}
    constants |= {"CLIP_VALUE": True, "KL_NEW_OLD": False, **options}
    return kernels.ppo_loss_kernel, constants, warps, dict.fromkeys(NETWORK, network) | {"counter_ptr": "i32"}


def gae(num_steps: int):
    kernels = _kernels("gae")
    constants = {"HAS_TIME_OUTS": True, "HAS_FINAL_VALUES": True, "NORMALIZE": True}
    constants |= {"BLOCK_T": kernels.block_t(num_steps), "BLOCK_E": kernels.BLOCK_E}
    constants |= {f"{t}_stride_e": 1 for t in ("rewards", "values", "dones", "time_outs", "final_values")}
    constants["last_values_stride"] = 1
    return kernels.gae_kernel, constants, kernels.NUM_WARPS, {"dones_ptr": "u8", "time_outs_ptr": "i1"}


def normalize():
    kernels = _kernels("gae")
    return kernels.normalize_kernel, {"BLOCK": kernels.NORMALIZE_BLOCK, "BLOCK_M": 128}, 4, {}


def gaussian(kernel: str, num_actions: int, **options):
    shape = _kernels("shapes").block_shape(num_actions)
    warps = shape.pop("num_warps")
    function = getattr(_kernels("gaussian"), kernel)
    strides = {name: num_actions for name in function.arg_names if name.endswith("_STRIDE")}
    return function, {"A": num_actions, **strides, **shape, **options}, warps, {}


def compiled(function, constants: dict, warps: int, types: dict[str, str], capability: int):
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, "fp32")
            if not function.params[i].do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]  # what torch allocates
        else:
            signature[name] = "i32" if name in INT_ARGUMENTS or "_stride" in name else "fp32"
    by_place = {(function.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, "enable_fp_fusion": True}
    source = ASTSource(fn=function, signature=signature, constexprs=by_place, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def facts(kernel) -> dict:
    """Registers, memory and the widths of global loads and stores, from the machine code.

    Rough divisions are Triton's ordinary ones, which are off by up to two units in the last place.
    Loads of what other programs wrote are ``partials``: they alone go past the first-level cache.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
        )
    functions = re.findall(r"Function (\w+)", usage)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    operations = Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)(?:\.\w+)*)\b", code))
    widths = {"load": Counter(), "partials": Counter(), "store": Counter()}
    for operation, count in operations.items():
        kind, *modifiers = operation.split(".")
        if kind in ("LDG", "STG"):
            bits = next((BITS[m] for m in modifiers if m in BITS), 32)
            what = "store" if kind == "STG" else "partials" if "STRONG" in modifiers else "load"
            widths[what][bits] += count
    return {
        "kernels": len(functions),
        "registers": registers,
        "shared": kernel.metadata.shared,
        "rough_divisions": kernel.asm["ptx"].count("div.full.f32"),
        "stack": stack,
        "local": local,
        "spills": sum(n for operation, n in operations.items() if operation.startswith(("LDL", "STL"))),
        "loads": {str(k): v for k, v in sorted(widths["load"].items())},
        "partials": {str(k): v for k, v in sorted(widths["partials"].items())},
        "stores": {str(k): v for k, v in sorted(widths["store"].items())},
    }


def cases(capability: int) -> dict[str, tuple]:
    """Every kernel; for one GPU also every branch and dtype."""
    found = {f"ppo_loss A={a}": ppo_loss(a) for a in (1, 12, 19, 29, 32, 37, 256)}
    found["gae T=24"] = gae(24)
    found["gae T=1"] = gae(1)
    found["normalize"] = normalize()
    if capability == 90:
        for std, old_std in (("[A]", "[A]"), ("[N, A]", "[A]"), ("[N, A]", "[N, A]")):
            found[f"ppo_loss A=12 std={std} old_std={old_std}"] = ppo_loss(12, std=std, old_std=old_std)
        found["ppo_loss A=12 new_old"] = ppo_loss(12, KL_NEW_OLD=True, CLIP_VALUE=False)
        for dtype in ("bf16", "fp16"):
            found[f"ppo_loss A=12 {dtype}"] = ppo_loss(12, dtype)
            found[f"ppo_loss A=29 {dtype}"] = ppo_loss(29, dtype)
        for kernel in ("log_prob", "log_prob_backward", "entropy", "entropy_backward", "kl", "kl_backward"):
            found[f"{kernel} A=12"] = gaussian(f"{kernel}_kernel", 12)
        found["kl_loss A=12"] = gaussian("kl_loss_kernel", 12, WHICH=4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, nargs="+", help="80, 86, 89, 90, 100, 120")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for capability in args.capability:
        for name, case in cases(capability).items():
            rows.append({"sm": capability, "kernel": name, **facts(compiled(*case, capability))})
            if not args.json:
                print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if args.json:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
