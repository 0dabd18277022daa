// Decoding: modifiers, operand slots, constants, special registers; from all statements of a module to code.
#include "decode.h"

#include <algorithm>
#include <set>

namespace dsv4::sim {
namespace {

struct Special { const char* name; Builtin what; bool wide; };
const Special kSpecial[] = {
    {"%tid.x", Builtin::tid_x, false}, {"%tid.y", Builtin::tid_y, false}, {"%tid.z", Builtin::tid_z, false},
    {"%ntid.x", Builtin::ntid_x, false}, {"%ntid.y", Builtin::ntid_y, false}, {"%ntid.z", Builtin::ntid_z, false},
    {"%ctaid.x", Builtin::ctaid_x, false}, {"%ctaid.y", Builtin::ctaid_y, false}, {"%ctaid.z", Builtin::ctaid_z, false},
    {"%nctaid.x", Builtin::nctaid_x, false}, {"%nctaid.y", Builtin::nctaid_y, false}, {"%nctaid.z", Builtin::nctaid_z, false},
    {"%laneid", Builtin::laneid, false}, {"%warpid", Builtin::warpid, false}, {"%nwarpid", Builtin::nwarpid, false},
    {"%smid", Builtin::smid, false}, {"%nsmid", Builtin::nsmid, false}, {"%gridid", Builtin::gridid, true},
    {"%lanemask_eq", Builtin::lanemask_eq, false}, {"%lanemask_le", Builtin::lanemask_le, false},
    {"%lanemask_lt", Builtin::lanemask_lt, false}, {"%lanemask_ge", Builtin::lanemask_ge, false},
    {"%lanemask_gt", Builtin::lanemask_gt, false},
    {"%clusterid.x", Builtin::clusterid_x, false}, {"%clusterid.y", Builtin::clusterid_y, false},
    {"%clusterid.z", Builtin::clusterid_z, false}, {"%nclusterid.x", Builtin::nclusterid_x, false},
    {"%nclusterid.y", Builtin::nclusterid_y, false}, {"%nclusterid.z", Builtin::nclusterid_z, false},
    {"%cluster_ctaid.x", Builtin::cluster_ctaid_x, false}, {"%cluster_ctaid.y", Builtin::cluster_ctaid_y, false},
    {"%cluster_ctaid.z", Builtin::cluster_ctaid_z, false}, {"%cluster_nctaid.x", Builtin::cluster_nctaid_x, false},
    {"%cluster_nctaid.y", Builtin::cluster_nctaid_y, false}, {"%cluster_nctaid.z", Builtin::cluster_nctaid_z, false},
    {"%cluster_ctarank", Builtin::cluster_ctarank, false}, {"%cluster_nctarank", Builtin::cluster_nctarank, false},
    {"%is_explicit_cluster", Builtin::is_explicit_cluster, false}, {"%total_smem_size", Builtin::total_smem_size, false},
    {"%dynamic_smem_size", Builtin::dynamic_smem_size, false}, {"%aggr_smem_size", Builtin::aggr_smem_size, false},
    {"%clock", Builtin::clock, false}, {"%clock_hi", Builtin::zero_word, false}, {"%clock64", Builtin::clock64, true},
    {"%globaltimer", Builtin::globaltimer, true}, {"%globaltimer_lo", Builtin::globaltimer, false},
    {"%globaltimer_hi", Builtin::zero_word, false},
};

Step read_clock(Ctx& c, const Instr& in) {  // one tick per warp instruction of the machine
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    if (in.a) out<uint64_t>(c, in, 0)[l] = c.machine->instructions;
    else out<uint32_t>(c, in, 0)[l] = static_cast<uint32_t>(c.machine->instructions);
  }
  return Step::next;
}

Step negate_pred(Ctx& c, const Instr& in) {
  put_pred(c, in, 0, ~pred(c, in, 1));
  return Step::next;
}

const Decoders& decoders() {
  static const Decoders table = [] {
    Decoders t;
    add_integer(t); add_logic(t); add_compare(t); add_float(t); add_half(t); add_convert(t); add_control(t); add_memory(t);
    add_atomic(t); add_warp_ops(t); add_sync(t); add_mbarrier(t); add_async(t); add_cluster(t); add_matrix(t);
    add_wgmma(t);
    add_tcgen05(t);
    return t;
  }();
  return table;
}
}  // namespace

bool Decode::take(const std::string& mod) {
  for (size_t i = 0; i < raw.mods.size(); ++i) {
    if (!used_[i] && raw.mods[i] == mod) return used_[i] = true;
  }
  return false;
}

int Decode::choose(std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* name : names) {
    if (take(name)) return i;
    ++i;
  }
  return -1;
}

int Decode::must(std::initializer_list<const char*> names) {
  const int i = choose(names);
  if (i >= 0) return i;
  std::string all;
  for (const char* name : names) all += std::string(all.empty() ? "." : ", .") + name;
  wrong("needs one of " + all + " here, as far as this interpreter models it");
}

Type Decode::maybe_type() {
  for (size_t i = 0; i < raw.mods.size(); ++i) {
    if (used_[i]) continue;
    const Type t = type_named(raw.mods[i]);
    if (t == Type::none) continue;
    used_[i] = true;
    return t;
  }
  return Type::none;
}

Type Decode::type() {
  const Type t = maybe_type();
  if (t == Type::none) wrong("needs a type");
  return t;
}

std::string Decode::first() const {
  for (size_t i = 0; i < raw.mods.size(); ++i) if (!used_[i]) return raw.mods[i];
  return "";
}

void Decode::wrong(const std::string& what) const {
  fail("PTX line %u (%s): '%s': %s.", raw.line, source_of(m, raw).c_str(), show(raw).c_str(), what.c_str());
}

const Arg& Decode::arg(size_t i) const {
  if (i >= raw.args.size()) wrong("has too few operands");
  auto& used = const_cast<std::vector<bool>&>(used_args_);
  used.resize(raw.args.size(), false);
  used[i] = true;
  return raw.args[i];
}

int32_t Decode::hidden(Type t) {
  const int32_t bytes = t == Type::pred ? 4 : bits_of(t) <= 32 ? 128 : bits_of(t) == 64 ? 256 : 512;
  const int32_t s = static_cast<int32_t>((f.register_bytes + bytes - 1) / bytes * bytes);
  f.register_bytes = static_cast<uint64_t>(s) + bytes;
  if (f.register_bytes > (1u << 26)) wrong("needs too many registers");
  return s;
}

void Decode::dst(const Arg& a, Type t) {
  if (a.kind == Arg::sink) return slot(hidden(t));
  if (a.kind != Arg::reg || a.negated) wrong("operand '" + a.text + "' is no register to write to");
  const Register& r = f.registers[a.reg_index];
  const bool same = r.type == Type::pred || t == Type::pred ? r.type == t
                    : bits_of(r.type) <= 32 ? bits_of(t) <= 32 : bits_of(r.type) == bits_of(t);
  if (!same) wrong("register " + r.name + " has type ." + name_of(r.type) + " where ." + name_of(t) + " is written");
  slot(r.slot);
}

void Decode::constant(uint64_t value, Type t) {
  const int width = t == Type::pred ? 1 : bits_of(t) == 128 ? 16 : wide_type(t) ? 8 : 4;
  if (t == Type::pred) value = value ? ~uint64_t{0} : 0;
  if (bits_of(t) < 32 && bits_of(t) > 1) value &= (uint64_t{1} << bits_of(t)) - 1;
  const auto key = std::make_pair(value, width);
  const auto it = pool->find(key);
  if (it != pool->end()) return slot(it->second);
  size_t at = (f.constants.size() + 15) & ~size_t{15};
  const size_t lanes = width == 1 ? 1 : 32, size = width == 1 ? 4 : width;
  f.constants.resize(at + lanes * size, 0);
  for (size_t l = 0; l < lanes; ++l) std::memcpy(f.constants.data() + at + l * size, &value, std::min<size_t>(size, 8));
  slot((*pool)[key] = ~static_cast<int32_t>(at));
}

int32_t Decode::builtin(Builtin what, int64_t add, bool wide) {
  for (const BuiltinSlot& b : f.builtins) if (b.what == what && b.add == add && b.wide == wide) return b.slot;
  const int32_t s = hidden(wide ? Type::b64 : Type::b32);
  f.builtins.push_back({what, add, s, wide});
  return s;
}

const Variable* Decode::module_variable(const std::string& name) const {
  for (const Variable& v : m.variables) if (v.name == name) return &v;
  return nullptr;
}

void Decode::src(const Arg& a, Type t) {
  switch (a.kind) {
    case Arg::reg: {
      const Register& r = f.registers[a.reg_index];
      const bool same = r.type == Type::pred || t == Type::pred ? r.type == t
                        : bits_of(r.type) <= 32 ? bits_of(t) <= 32 : bits_of(r.type) == bits_of(t);
      if (!same) wrong("register " + r.name + " has type ." + name_of(r.type) + " where ." + name_of(t) + " is read");
      if (!a.negated) return slot(r.slot);
      if (t != Type::pred) wrong("only predicates can be negated");
      const int32_t s = hidden(Type::pred);
      Prelude p;
      p.in.run = negate_pred;
      p.slots = {s, r.slot};
      before.push_back(p);
      return slot(s);
    }
    case Arg::integer:
      if (t == Type::f32 || t == Type::f64) wrong("a real constant was expected instead of " + a.text);
      return constant(a.value, t);
    case Arg::real: {
      uint64_t v = a.value;
      if (a.real_bits == 64 && bits_of(t) == 32) {
        double d; std::memcpy(&d, &v, 8);
        const float x = static_cast<float>(d);
        uint32_t u; std::memcpy(&u, &x, 4);
        v = u;
      } else if (a.real_bits == 32 && bits_of(t) == 64) {
        float x; const uint32_t u = static_cast<uint32_t>(v); std::memcpy(&x, &u, 4);
        const double d = x;
        std::memcpy(&v, &d, 8);
      } else if (bits_of(t) < 32) wrong("a 16-bit real constant is written as bits");
      return constant(v, t);
    }
    case Arg::special: {
      for (const Special& s : kSpecial) {
        if (a.text != s.name) continue;
        if (s.what == Builtin::clock || s.what == Builtin::clock64 || s.what == Builtin::globaltimer) {
          const int32_t h = hidden(t);
          Prelude p;
          p.in.run = read_clock;
          p.in.a = wide_type(t);
          p.slots = {h};
          before.push_back(p);
          return slot(h);
        }
        return slot(builtin(s.what, 0, wide_type(t)));
      }
      wrong("special register " + a.text + " is not modelled");
    }
    case Arg::symbol: {
      if (a.real_bits) {
        const auto space = static_cast<Space>(a.real_bits - 1);
        if (space == Space::local) return slot(builtin(Builtin::local_base, static_cast<int64_t>(a.value), wide_type(t)));
        if (space == Space::shared) return slot(builtin(Builtin::static_shared, static_cast<int64_t>(f.shared_base + a.value), wide_type(t)));
        return constant(a.value, t);
      }
      const Variable* v = module_variable(a.text);
      if (!v) wrong("'" + a.text + "' is not defined, or its address is not modelled");
      if (v->dynamic) return slot(builtin(Builtin::dynamic_shared, 0, wide_type(t)));
      if (v->space == Space::shared) return slot(builtin(Builtin::static_shared, static_cast<int64_t>(v->offset), wide_type(t)));
      return constant(reinterpret_cast<uint64_t>(v->data), t);
    }
    default: wrong("an operand has a form that is not modelled here");
  }
}

bool Decode::wide(const Arg& a) {
  bool w = true;
  if (a.kind == Arg::reg) {
    const Type t = f.registers[a.reg_index].type;
    if (bits_of(t) != 32 && bits_of(t) != 64) wrong("an address has 32 or 64 bits");
    w = bits_of(t) == 64;
  }
  src(a, w ? Type::b64 : Type::b32);
  return w;
}

bool Decode::memory(size_t i) {
  const Arg& a = arg(i);
  if (a.kind != Arg::memory) wrong("operand " + std::to_string(i + 1) + " must be an address in brackets");
  in.imm = a.offset;
  return wide(a.parts[0]);
}

void Decode::finish() {
  const std::string left = first();
  if (!left.empty()) wrong("modifier ." + left + " is not modelled here");
  used_args_.resize(raw.args.size(), false);
  for (size_t i = 0; i < raw.args.size(); ++i) {
    if (!used_args_[i]) wrong("operand " + std::to_string(i + 1) + " is one too many");
  }
}

Step fell_off(Ctx&, const Instr&);  // control.cpp

namespace {
void decode_function(Function& f, const Module& m) {
  std::map<std::pair<uint64_t, int>, int32_t> pool;
  std::vector<size_t> starts, code_of(f.statements.size() + 1);
  const std::vector<bool> of_products = product_registers(f);
  const auto append = [&](Instr in, const std::vector<int32_t>& slots, size_t raw) {
    if (slots.size() > 255) fail("PTX line %u: an instruction has more than 255 operands.", f.statements[raw].line);
    in.count = static_cast<uint8_t>(slots.size());
    in.raw = static_cast<uint32_t>(raw);
    starts.push_back(f.slots.size());
    f.slots.insert(f.slots.end(), slots.begin(), slots.end());
    f.code.push_back(in);
  };
  for (size_t i = 0; i < f.statements.size(); ++i) {
    const Raw& raw = f.statements[i];
    code_of[i] = f.code.size();
    Decode d(f, m, raw);
    d.pool = &pool;
    const auto it = decoders().find(raw.op);
    if (it == decoders().end()) d.wrong("instruction '" + raw.op + "' is not modelled");
    if (raw.guard >= 0) {
      if (f.registers[raw.guard].type != Type::pred) d.wrong("the guard is no predicate");
      d.in.guard = f.registers[raw.guard].slot;
      d.in.guard_not = raw.guard_not;
    }
    it->second(d);
    d.finish();
    if (!of_products.empty()) guard_products(d, of_products);
    for (const Decode::Prelude& p : d.before) append(p.in, p.slots, i);
    append(d.in, d.slots, i);
  }
  code_of[f.statements.size()] = f.code.size();
  Raw end;
  end.line = f.line;
  end.op = "(end of the function)";
  f.statements.push_back(end);
  Instr last;
  last.run = fell_off;
  append(last, {}, f.statements.size() - 1);
  for (size_t i = 0; i < f.code.size(); ++i) {
    Instr& in = f.code[i];
    in.op = f.slots.data() + starts[i];
    if (f.statements[in.raw].op == "bra") in.imm = static_cast<int64_t>(code_of[static_cast<size_t>(in.imm)]);
  }
  for (auto& list : f.branch_targets) for (int32_t& to : list) to = static_cast<int32_t>(code_of[to]);
}

uint64_t chain(const Function& f, std::set<const Function*>& open) {  // local memory of the deepest chain of calls
  if (open.count(&f) || open.size() > 64) return 1 << 16;  // recursion: a fixed share
  open.insert(&f);
  uint64_t deepest = 0;
  for (const Function* g : f.callees) deepest = std::max(deepest, g->local_chain ? g->local_chain : chain(*g, open));
  open.erase(&f);
  return f.local_chain = (f.local_bytes + 15) / 16 * 16 + deepest;
}
}  // namespace

void decode_module(Module& m) {
  for (auto& [name, f] : m.functions) {
    if (f->entry || !f->shared_bytes) continue;
    f->shared_base = (m.shared_bytes + f->shared_align - 1) / f->shared_align * f->shared_align;
    m.shared_bytes = f->shared_base + f->shared_bytes;
  }
  for (auto& [name, f] : m.functions) {
    if (f->entry) f->shared_base = (m.shared_bytes + f->shared_align - 1) / f->shared_align * f->shared_align;
    if (f->external) { f->error = "function '" + name + "' has no body in this module"; continue; }
    try {
      decode_function(*f, m);
    } catch (const Error& e) {
      f->error = e.text;
    }
  }
  for (auto& [name, f] : m.functions) {
    std::set<const Function*> open;
    f->local_chain = chain(*f, open) + 16;
  }
}

}  // namespace dsv4::sim
