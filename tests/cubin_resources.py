"""What the ELF headers of a cubin say: architecture, registers, stack, static shared memory, bytes of code. No code is read."""

import struct

CUDA = 190  # e_machine
SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, alignment, entry size
REGISTERS, FRAME = 0x2F, 0x11  # attributes in .nv.info: (symbol, value); checked with nvcc -Xptxas -v


def cubins(module: bytes) -> list[bytes]:
    """The cubins embedded in a host object, each up to the object's end."""
    starts = [i for i in range(0, len(module), 8) if module[i : i + 4] == b"\x7fELF"]
    return [module[i:] for i in starts if struct.unpack_from("<H", module, i + 18)[0] == CUDA]


def _attributes(info: bytes):
    """(attribute, (symbol, value)) of those entries of .nv.info that hold a pair of words."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        payload = size if form == 4 else 0  # other forms keep their value in the size field
        if payload == 8:
            yield attribute, struct.unpack_from("<II", info, at + 4)
        at += 4 + payload


def resources(cubin: bytes) -> dict[str, int]:
    """arch (100 for sm_100), kernels, and the largest registers, stack, shared_bytes, code_bytes of a kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    flags, count, names_index = *struct.unpack_from("<I", cubin, 48), *struct.unpack_from("<HH", cubin, 60)
    sections = [SECTION.unpack_from(cubin, table + SECTION.size * i) for i in range(count)]
    names = sections[names_index][4]
    out = {"arch": flags >> 8 & 0xFF, "kernels": 0, "registers": 0, "stack": 0, "shared_bytes": 0, "code_bytes": 0}
    for name, _, _, _, offset, size, *_ in sections:
        name = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if name.startswith(".text."):
            out["kernels"] += 1
            out["code_bytes"] = max(out["code_bytes"], size)
        elif name.startswith(".nv.shared.") and not name.startswith(".nv.shared.reserved"):
            out["shared_bytes"] = max(out["shared_bytes"], size)
        elif name == ".nv.info":
            for attribute, (_, value) in _attributes(cubin[offset : offset + size]):
                key = {REGISTERS: "registers", FRAME: "stack"}.get(attribute)
                if key is not None:
                    out[key] = max(out[key], value)
    return out
