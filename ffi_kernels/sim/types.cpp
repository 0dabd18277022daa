// Names and widths of types; sentences; how a statement and its source are shown.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <unordered_map>

#include "module.h"

namespace dsv4::sim {
namespace {
struct Row { Type type; const char* name; int bits; };
const Row kTypes[] = {
    {Type::none, "none", 0}, {Type::u8, "u8", 8}, {Type::u16, "u16", 16}, {Type::u32, "u32", 32}, {Type::u64, "u64", 64},
    {Type::s8, "s8", 8}, {Type::s16, "s16", 16}, {Type::s32, "s32", 32}, {Type::s64, "s64", 64}, {Type::b8, "b8", 8},
    {Type::b16, "b16", 16}, {Type::b32, "b32", 32}, {Type::b64, "b64", 64}, {Type::b128, "b128", 128}, {Type::pred, "pred", 1},
    {Type::f16, "f16", 16}, {Type::f16x2, "f16x2", 32}, {Type::bf16, "bf16", 16}, {Type::bf16x2, "bf16x2", 32}, {Type::f32, "f32", 32},
    {Type::f32x2, "f32x2", 64}, {Type::f64, "f64", 64}, {Type::tf32, "tf32", 32}, {Type::e4m3, "e4m3", 8}, {Type::e5m2, "e5m2", 8},
    {Type::e4m3x2, "e4m3x2", 16}, {Type::e5m2x2, "e5m2x2", 16}, {Type::e2m1x2, "e2m1x2", 8}, {Type::e2m3x2, "e2m3x2", 16},
    {Type::e3m2x2, "e3m2x2", 16}, {Type::ue8m0x2, "ue8m0x2", 16}, {Type::u16x2, "u16x2", 32}, {Type::s16x2, "s16x2", 32},
    {Type::s4, "s4", 4}, {Type::u4, "u4", 4}, {Type::b1, "b1", 1}, {Type::e2m1, "e2m1", 4}, {Type::e2m3, "e2m3", 6}, {Type::e3m2, "e3m2", 6},
    {Type::ue8m0, "ue8m0", 8}, {Type::ue4m3, "ue4m3", 8}, {Type::e4m3x4, "e4m3x4", 32}, {Type::e5m2x4, "e5m2x4", 32},
    {Type::e2m1x4, "e2m1x4", 16}, {Type::e2m3x4, "e2m3x4", 32}, {Type::e3m2x4, "e3m2x4", 32},
};
}  // namespace

Type type_named(const std::string& name) {
  static const std::unordered_map<std::string, Type> table = [] {
    std::unordered_map<std::string, Type> t;
    for (const Row& r : kTypes) if (r.bits) t[r.name] = r.type;
    return t;
  }();
  const auto it = table.find(name);
  return it == table.end() ? Type::none : it->second;
}

const char* name_of(Type type) { return kTypes[static_cast<int>(type)].name; }
int bits_of(Type type) { return kTypes[static_cast<int>(type)].bits; }

namespace {
std::string format(const char* f, va_list args) {
  va_list again;
  va_copy(again, args);
  std::string s(static_cast<size_t>(std::max(0, std::vsnprintf(nullptr, 0, f, again))), ' ');
  va_end(again);
  std::vsnprintf(s.data(), s.size() + 1, f, args);
  return s;
}
}  // namespace

void fail(const char* f, ...) {
  va_list args;
  va_start(args, f);
  Error error{format(f, args)};
  va_end(args);
  throw error;
}

std::string text_of(const char* f, ...) {
  va_list args;
  va_start(args, f);
  std::string s = format(f, args);
  va_end(args);
  return s;
}

std::string source_of(const Module& module, const Raw& raw) {
  const auto name = [&](uint32_t file) {
    const auto it = module.files.find(file);
    if (it == module.files.end()) return std::string("?");
    const size_t slash = it->second.rfind('/');
    return slash == std::string::npos ? it->second : it->second.substr(slash + 1);
  };
  if (!raw.loc.file) return "no source line";
  std::string s = name(raw.loc.outer_file) + ":" + std::to_string(raw.loc.outer_line);
  if (raw.loc.outer_file != raw.loc.file || raw.loc.outer_line != raw.loc.line) {
    s += " (inlined from " + name(raw.loc.file) + ":" + std::to_string(raw.loc.line) + ")";
  }
  return s;
}

namespace {
std::string show_arg(const Arg& a) {
  const auto join = [&](const char* open, const char* gap, const char* close, size_t from = 0) {
    std::string s = open;
    for (size_t i = from; i < a.parts.size(); ++i) s += (i > from ? gap : "") + show_arg(a.parts[i]);
    return s + close;
  };
  switch (a.kind) {
    case Arg::memory: {
      std::string s = "[" + show_arg(a.parts[0]);
      if (a.offset) s += (a.offset > 0 ? "+" : "") + std::to_string(a.offset);
      return s + (a.parts.size() > 1 ? join(", ", ", ", "]", 1) : "]");
    }
    case Arg::vector: return join("{", ",", "}");
    case Arg::list: return join("(", ",", ")");
    case Arg::pair: return join("", "|", "");
    case Arg::sink: return "_";
    case Arg::reg: return (a.negated ? "!" : "") + a.text;
    default: return a.text;
  }
}
}  // namespace

std::string show(const Raw& raw) {
  std::string s = raw.op;
  for (const std::string& m : raw.mods) s += "." + m;
  for (size_t i = 0; i < raw.args.size(); ++i) s += (i ? ", " : " ") + show_arg(raw.args[i]);
  return s.size() > 200 ? s.substr(0, 200) + "..." : s;
}

}  // namespace dsv4::sim
