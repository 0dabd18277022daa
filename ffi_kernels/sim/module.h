// The parsed program: types, operands, instructions, functions, modules. What executes them is in machine.h.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace dsv4::sim {

struct Error {  // the sentence that ends a launch
  std::string text;
};
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text_of(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Type : uint8_t {
  none, u8, u16, u32, u64, s8, s16, s32, s64, b8, b16, b32, b64, b128, pred, f16, f16x2, bf16, bf16x2, f32, f32x2, f64,
  tf32, e4m3, e5m2, e4m3x2, e5m2x2, e2m1x2, e2m3x2, e3m2x2, ue8m0x2, u16x2, s16x2, s4, u4, b1, e2m1, e2m3, e3m2, ue8m0, ue4m3,
  e4m3x4, e5m2x4, e2m1x4, e2m3x4, e3m2x4
};
Type type_named(const std::string& name);  // none if it is no type
const char* name_of(Type type);
int bits_of(Type type);
inline bool is_signed(Type t) { return t >= Type::s8 && t <= Type::s64; }
inline bool is_integer(Type t) { return t >= Type::u8 && t <= Type::s64; }
inline bool is_bits(Type t) { return t >= Type::b8 && t <= Type::b128; }

enum class Space : uint8_t { generic, global, shared, cluster, local, param, constant };

struct Arg {  // an operand as written
  enum Kind : uint8_t { reg, integer, real, symbol, special, sink, vector, memory, pair, list } kind = sink;
  std::string text;
  int reg_index = -1;
  uint64_t value = 0;  // integer, or the IEEE bits of a real
  int real_bits = 0;   // 32 or 64
  bool negated = false;
  int64_t offset = 0;       // memory
  std::vector<Arg> parts;   // vector, pair, list: the elements; memory: base, then vectors of coordinates
};

struct Location {  // CUDA source, from .loc
  uint32_t file = 0, line = 0, outer_file = 0, outer_line = 0;  // outer: where the inlining began
};

struct Raw {  // a statement as written
  uint32_t id = 0;  // in Module::statements
  uint32_t line = 0;
  Location loc;
  std::string op;
  std::vector<std::string> mods;
  std::vector<Arg> args;
  int guard = -1;  // register index
  bool guard_not = false;
  int scope = 0;
};

struct Ctx;
struct Instr;
enum class Step : uint8_t { next, jump, call, ret, exit, block, yield };
using Handler = Step (*)(Ctx&, const Instr&);

struct Instr {
  Handler run = nullptr;
  const int32_t* op = nullptr;  // slots: offset in the frame's registers if >= 0, else ~offset in the constants
  int32_t guard = -1;           // slot of the predicate
  bool guard_not = false;
  uint8_t count = 0;
  uint16_t a = 0, b = 0, c = 0;  // meaning belongs to the handler
  uint32_t raw = 0;              // index of the statement
  int64_t imm = 0;
  const void* extra = nullptr;   // owned by the function
};

struct Register {
  std::string name;
  Type type;
  int32_t slot;
};

struct Variable {
  std::string name;
  Space space = Space::generic;
  uint64_t align = 1, size = 0, offset = 0;
  bool dynamic = false;       // extern shared
  const uint8_t* data = nullptr;  // global and constant
};

enum class Builtin : uint8_t {
  tid_x, tid_y, tid_z, ntid_x, ntid_y, ntid_z, ctaid_x, ctaid_y, ctaid_z, nctaid_x, nctaid_y, nctaid_z, laneid, warpid, nwarpid,
  smid, nsmid, gridid, lanemask_eq, lanemask_le, lanemask_lt, lanemask_ge, lanemask_gt, clusterid_x, clusterid_y, clusterid_z,
  nclusterid_x, nclusterid_y, nclusterid_z, cluster_ctaid_x, cluster_ctaid_y, cluster_ctaid_z, cluster_nctaid_x, cluster_nctaid_y,
  cluster_nctaid_z, cluster_ctarank, cluster_nctarank, is_explicit_cluster, total_smem_size, dynamic_smem_size, aggr_smem_size,
  zero_word, clock, clock64, globaltimer, static_shared, dynamic_shared, local_base
};

struct BuiltinSlot {  // filled when a frame is made
  Builtin what;
  int64_t add;
  int32_t slot;
  bool wide;
};

struct Module;

struct Function {
  std::string name;
  uint32_t line = 0;
  bool entry = false, external = false;
  const Module* module = nullptr;
  std::vector<Variable> params, returns;       // formals; offsets in the parameter area
  uint64_t param_bytes = 0, local_bytes = 0, shared_bytes = 0, register_bytes = 0;
  uint64_t shared_base = 0, shared_align = 16;  // where this function's shared variables start
  mutable uint64_t local_chain = 0;                    // own and callees'
  uint32_t max_threads[3] = {0, 0, 0}, required_threads[3] = {0, 0, 0}, required_cluster[3] = {0, 0, 0};
  std::vector<Register> registers;
  std::vector<Raw> statements;
  std::vector<Instr> code;
  std::vector<int32_t> slots;
  std::vector<uint8_t> constants;
  std::vector<BuiltinSlot> builtins;
  std::vector<std::shared_ptr<void>> extras;
  std::vector<std::vector<int32_t>> branch_targets;
  std::vector<const Function*> callees;
  std::string error;  // why it cannot run
};

struct Module {
  std::string path, target;
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<uint32_t, std::string> files;
  std::vector<std::unique_ptr<std::vector<uint64_t>>> storage;  // module-level variables, read-only
  std::vector<Variable> variables;
  uint64_t shared_bytes = 0;  // module-level static shared memory
  std::vector<const Raw*> statements{nullptr};  // of all functions
};

// Parsed and decoded, cached by path, size and time of modification. Throws Error.
std::shared_ptr<const Module> load_module(const std::string& path);
std::unique_ptr<Module> parse_module(const std::string& text, const std::string& path);
std::string source_of(const Module& module, const Raw& raw);  // "file.cu:12 (in other.h:3)"
std::string show(const Raw& raw);                             // the statement, roughly as written

}  // namespace dsv4::sim
