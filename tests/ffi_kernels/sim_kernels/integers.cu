// One kernel per integer instruction: d[i] = op(a[i], b[i], c[i]), of 16, 32 or 64 bits, or from one width to another.
#include <cstdint>

#define OP(name, In, Third, Out, text, in_kind, third_kind, out_kind)                           \
  struct name##_params { const In* a; const In* b; const Third* c; Out* d; int n; };            \
  extern "C" __global__ void name(const __grid_constant__ name##_params p) {                    \
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) { \
      Out d;                                                                                    \
      asm(text : "=" out_kind(d) : in_kind(p.a[i]), in_kind(p.b[i]), third_kind(p.c[i]));       \
      p.d[i] = d;                                                                               \
    }                                                                                           \
  }
#define U(name, text) OP(name, uint32_t, uint32_t, uint32_t, text, "r", "r", "r")
#define L(name, text) OP(name, uint64_t, uint64_t, uint64_t, text, "l", "l", "l")
#define H(name, text) OP(name, uint16_t, uint16_t, uint16_t, text, "h", "h", "h")
#define HU(name, text) OP(name, uint16_t, uint32_t, uint32_t, text, "h", "r", "r")  // 16 bits widen to 32
#define UL(name, text) OP(name, uint32_t, uint64_t, uint64_t, text, "r", "l", "l")  // 32 bits widen to 64
#define LU(name, text) OP(name, uint64_t, uint32_t, uint32_t, text, "l", "r", "r")  // counts and places in 64 bits
#define LS(name, text) OP(name, uint64_t, uint32_t, uint64_t, text, "l", "r", "l")  // 64 bits, shifted by 32

U(add_u32, "add.u32 %0, %1, %2;") U(add_sat, "add.sat.s32 %0, %1, %2;") U(sub_u32, "sub.u32 %0, %1, %2;") U(sub_sat, "sub.sat.s32 %0, %1, %2;")
U(mul_lo, "mul.lo.u32 %0, %1, %2;") U(mul_hi_u, "mul.hi.u32 %0, %1, %2;") U(mul_hi_s, "mul.hi.s32 %0, %1, %2;") U(mad_lo, "mad.lo.s32 %0, %1, %2, %3;")
U(mad_hi_u, "mad.hi.u32 %0, %1, %2, %3;") U(mad_hi_s, "mad.hi.s32 %0, %1, %2, %3;")
U(mul24_lo_u, "{ .reg .b32 x, y; and.b32 x, %1, 0xffffff; and.b32 y, %2, 0xffffff; mul24.lo.u32 %0, x, y; }")
U(mul24_hi_u, "{ .reg .b32 x, y; and.b32 x, %1, 0xffffff; and.b32 y, %2, 0xffffff; mul24.hi.u32 %0, x, y; }")
U(mul24_hi_s, "{ .reg .b32 x, y; shr.s32 x, %1, 8; shr.s32 y, %2, 8; mul24.hi.s32 %0, x, y; }")
U(mad24_lo_s, "{ .reg .b32 x, y; shr.s32 x, %1, 8; shr.s32 y, %2, 8; mad24.lo.s32 %0, x, y, %3; }")
U(mad24_hi_u, "{ .reg .b32 x, y; and.b32 x, %1, 0xffffff; and.b32 y, %2, 0xffffff; mad24.hi.u32 %0, x, y, %3; }")
U(div_s, "div.s32 %0, %1, %2;") U(div_u, "div.u32 %0, %1, %2;") U(rem_s, "rem.s32 %0, %1, %2;") U(rem_u, "rem.u32 %0, %1, %2;")
U(sad_s, "sad.s32 %0, %1, %2, %3;") U(sad_u, "sad.u32 %0, %1, %2, %3;") U(min_s, "min.s32 %0, %1, %2;") U(max_s, "max.s32 %0, %1, %2;")
U(min_u, "min.u32 %0, %1, %2;") U(max_u, "max.u32 %0, %1, %2;") U(min_relu, "min.relu.s32 %0, %1, %2;") U(max_relu, "max.relu.s32 %0, %1, %2;")
U(abs_s, "abs.s32 %0, %1;") U(neg_s, "neg.s32 %0, %1;") U(and_b, "and.b32 %0, %1, %2;") U(or_b, "or.b32 %0, %1, %2;") U(xor_b, "xor.b32 %0, %1, %2;")
U(not_b, "not.b32 %0, %1;") U(cnot, "cnot.b32 %0, %1;") U(popc, "popc.b32 %0, %1;") U(clz, "clz.b32 %0, %1;") U(brev, "brev.b32 %0, %1;")
U(bfind_s, "bfind.s32 %0, %1;") U(bfind_u, "bfind.u32 %0, %1;") U(bfind_shift_s, "bfind.shiftamt.s32 %0, %1;") U(bfind_shift_u, "bfind.shiftamt.u32 %0, %1;")
U(fns, "{ .reg .b32 x, y; and.b32 x, %2, 31; shr.s32 y, %3, 29; fns.b32 %0, %1, x, y; }")
U(bfe_s, "bfe.s32 %0, %1, %2, %3;") U(bfe_u, "bfe.u32 %0, %1, %2, %3;") U(bfi, "{ bfi.b32 %0, %1, 0x12345678, %2, %3; }")
U(bmsk_clamp, "bmsk.clamp.b32 %0, %2, %3;") U(bmsk_wrap, "bmsk.wrap.b32 %0, %2, %3;")
U(szext_clamp_s, "szext.clamp.s32 %0, %1, %3;") U(szext_clamp_u, "szext.clamp.u32 %0, %1, %3;") U(szext_wrap_s, "szext.wrap.s32 %0, %1, %3;") U(szext_wrap_u, "szext.wrap.u32 %0, %1, %3;")
U(shl, "shl.b32 %0, %1, %3;") U(shr_s, "shr.s32 %0, %1, %3;") U(shr_u, "shr.u32 %0, %1, %3;")
U(shf_l_wrap, "shf.l.wrap.b32 %0, %1, %2, %3;") U(shf_l_clamp, "shf.l.clamp.b32 %0, %1, %2, %3;")
U(shf_r_wrap, "shf.r.wrap.b32 %0, %1, %2, %3;") U(shf_r_clamp, "shf.r.clamp.b32 %0, %1, %2, %3;")
U(lop3_96, "lop3.b32 %0, %1, %2, %3, 0x96;") U(lop3_e8, "lop3.b32 %0, %1, %2, %3, 0xE8;") U(lop3_2b, "lop3.b32 %0, %1, %2, %3, 0x2B;")
U(lop3_or, "{ .reg .pred p, q; .reg .b32 t; setp.lt.s32 q, %1, 0; lop3.or.b32 t|p, %1, %2, %3, 0x80, q; selp.b32 %0, 1, t, p; }")
U(prmt, "prmt.b32 %0, %1, %2, %3;") U(prmt_f4e, "prmt.b32.f4e %0, %1, %2, %3;") U(prmt_b4e, "prmt.b32.b4e %0, %1, %2, %3;") U(prmt_rc8, "prmt.b32.rc8 %0, %1, %2, %3;")
U(prmt_ecl, "prmt.b32.ecl %0, %1, %2, %3;") U(prmt_ecr, "prmt.b32.ecr %0, %1, %2, %3;") U(prmt_rc16, "prmt.b32.rc16 %0, %1, %2, %3;")
U(dp4a_ss, "dp4a.s32.s32 %0, %1, %2, %3;") U(dp4a_su, "dp4a.s32.u32 %0, %1, %2, %3;") U(dp4a_us, "dp4a.u32.s32 %0, %1, %2, %3;") U(dp4a_uu, "dp4a.u32.u32 %0, %1, %2, %3;")
U(dp2a_lo_ss, "dp2a.lo.s32.s32 %0, %1, %2, %3;") U(dp2a_hi_ss, "dp2a.hi.s32.s32 %0, %1, %2, %3;") U(dp2a_lo_uu, "dp2a.lo.u32.u32 %0, %1, %2, %3;") U(dp2a_hi_us, "dp2a.hi.u32.s32 %0, %1, %2, %3;")
U(add_u16x2, "add.u16x2 %0, %1, %2;") U(min_u16x2, "min.u16x2 %0, %1, %2;") U(max_s16x2, "max.s16x2 %0, %1, %2;") U(min_relu_s16x2, "min.relu.s16x2 %0, %1, %2;")
U(carry_in, "{ .reg .b32 t; add.cc.u32 t, %1, %2; addc.u32 %0, %3, 0; }") U(borrow, "{ .reg .b32 t; sub.cc.u32 t, %1, %2; subc.u32 %0, %3, 0; }")
U(carries, "{ .reg .b32 s, t; add.cc.u32 s, %1, %2; addc.cc.u32 t, %2, %3; addc.u32 %0, %3, t; xor.b32 %0, %0, s; }")
U(mad_carry, "{ .reg .b32 s, t; mad.lo.cc.u32 s, %1, %2, %3; madc.hi.cc.u32 t, %1, %2, %3; addc.u32 %0, t, s; }")
U(slct_s, "slct.s32.s32 %0, %1, %2, %3;") U(slct_f, "{ .reg .f32 x; mov.b32 x, %3; slct.b32.f32 %0, %1, %2, x; }")
U(set_lt, "set.lt.u32.s32 %0, %1, %2;") U(set_f, "{ .reg .f32 x; set.hi.f32.u32 x, %1, %2; mov.b32 %0, x; }")
U(set_and, "{ .reg .pred p; setp.ne.u32 p, %3, 7; set.ge.and.s32.s32 %0, %1, %2, p; }")
#define BIT(compare, type, bit) " setp." compare "." type " p, %1, %2; selp.b32 t, " bit ", 0, p; or.b32 %0, %0, t;"
U(setp_s32, "{ .reg .pred p; .reg .b32 t; mov.b32 %0, 0;" BIT("eq", "s32", "1") BIT("ne", "s32", "2") BIT("lt", "s32", "4") BIT("le", "s32", "8") BIT("gt", "s32", "16") BIT("ge", "s32", "32") "}")
U(setp_u32, "{ .reg .pred p; .reg .b32 t; mov.b32 %0, 0;" BIT("eq", "b32", "1") BIT("ne", "b32", "2") BIT("lo", "u32", "4") BIT("ls", "u32", "8") BIT("hi", "u32", "16") BIT("hs", "u32", "32") "}")
U(setp_two, "{ .reg .pred p, q, r; .reg .b32 t; setp.lt.s32 r, %3, 0; setp.lt.xor.s32 p|q, %1, %2, r; selp.b32 %0, 1, 2, p; selp.b32 t, 4, 8, q; or.b32 %0, %0, t; }")
LU(setp_s64, "{ .reg .pred p; .reg .b32 t; mov.b32 %0, 0;" BIT("eq", "s64", "1") BIT("ne", "s64", "2") BIT("lt", "s64", "4") BIT("le", "s64", "8") BIT("gt", "s64", "16") BIT("ge", "s64", "32") "}")
HU(setp_s16, "{ .reg .pred p; .reg .b32 t; mov.b32 %0, 0;" BIT("eq", "s16", "1") BIT("ne", "s16", "2") BIT("lt", "s16", "4") BIT("le", "s16", "8") BIT("gt", "s16", "16") BIT("ge", "s16", "32") "}")
U(predicates, "{ .reg .pred p, q, r; setp.lt.s32 p, %1, %2; setp.lt.s32 q, %2, %3; xor.pred r, p, q; not.pred q, q; and.pred q, q, r; or.pred p, p, q; selp.b32 %0, 3, 5, p; @r add.u32 %0, %0, 8; @!r add.u32 %0, %0, 16; }")

L(add_64, "add.u64 %0, %1, %2;") L(sub_64, "sub.s64 %0, %1, %2;") L(mul_lo_64, "mul.lo.u64 %0, %1, %2;") L(mul_hi_u64, "mul.hi.u64 %0, %1, %2;") L(mul_hi_s64, "mul.hi.s64 %0, %1, %2;")
L(mad_lo_64, "mad.lo.u64 %0, %1, %2, %3;") L(mad_hi_s64, "mad.hi.s64 %0, %1, %2, %3;") L(div_s64, "div.s64 %0, %1, %2;") L(div_u64, "div.u64 %0, %1, %2;") L(rem_s64, "rem.s64 %0, %1, %2;")
L(rem_u64, "rem.u64 %0, %1, %2;") L(min_s64, "min.s64 %0, %1, %2;") L(max_u64, "max.u64 %0, %1, %2;") L(abs_s64, "abs.s64 %0, %1;") L(neg_s64, "neg.s64 %0, %1;")
L(and_64, "and.b64 %0, %1, %2;") L(or_64, "or.b64 %0, %1, %2;") L(xor_64, "xor.b64 %0, %1, %2;") L(not_64, "not.b64 %0, %1;") L(cnot_64, "cnot.b64 %0, %1;") L(brev_64, "brev.b64 %0, %1;")
L(sad_s64, "sad.s64 %0, %1, %2, %3;") L(carries_64, "{ .reg .b64 t; add.cc.u64 t, %1, %2; addc.u64 %0, %3, t; }") L(borrow_64, "{ .reg .b64 t; sub.cc.u64 t, %1, %2; subc.u64 %0, %3, t; }")
LU(popc_64, "popc.b64 %0, %1;") LU(clz_64, "clz.b64 %0, %1;") LU(bfind_s64, "bfind.s64 %0, %1;") LU(bfind_shift_u64, "bfind.shiftamt.u64 %0, %1;")
LS(shl_64, "shl.b64 %0, %1, %3;") LS(shr_s64, "shr.s64 %0, %1, %3;") LS(shr_u64, "shr.u64 %0, %1, %3;")
LS(bfe_s64, "{ .reg .b32 x; cvt.u32.u64 x, %2; and.b32 x, x, 255; bfe.s64 %0, %1, %3, x; }") LS(bfe_u64, "{ .reg .b32 x; cvt.u32.u64 x, %2; and.b32 x, x, 255; bfe.u64 %0, %1, x, %3; }")
LS(bfi_64, "{ .reg .b32 x; cvt.u32.u64 x, %2; and.b32 x, x, 63; bfi.b64 %0, %1, %2, x, %3; }")

H(add_16, "add.s16 %0, %1, %2;") H(sub_16, "sub.u16 %0, %1, %2;") H(mul_lo_16, "mul.lo.u16 %0, %1, %2;") H(mul_hi_u16, "mul.hi.u16 %0, %1, %2;") H(mul_hi_s16, "mul.hi.s16 %0, %1, %2;")
H(mad_lo_16, "mad.lo.u16 %0, %1, %2, %3;") H(div_s16, "div.s16 %0, %1, %2;") H(div_u16, "div.u16 %0, %1, %2;") H(rem_s16, "rem.s16 %0, %1, %2;") H(rem_u16, "rem.u16 %0, %1, %2;")
H(min_s16, "min.s16 %0, %1, %2;") H(max_u16, "max.u16 %0, %1, %2;") H(abs_s16, "abs.s16 %0, %1;") H(neg_s16, "neg.s16 %0, %1;") H(xor_16, "xor.b16 %0, %1, %2;") H(not_16, "not.b16 %0, %1;")
H(sad_u16, "sad.u16 %0, %1, %2, %3;") H(shl_16, "{ .reg .b32 x; cvt.u32.u16 x, %3; shl.b16 %0, %1, x; }") H(shr_s16, "{ .reg .b32 x; cvt.u32.u16 x, %3; shr.s16 %0, %1, x; }")
HU(mul_wide_u16, "mul.wide.u16 %0, %1, %2;") HU(mul_wide_s16, "mul.wide.s16 %0, %1, %2;") HU(mad_wide_s16, "mad.wide.s16 %0, %1, %2, %3;")
UL(mul_wide_u32, "mul.wide.u32 %0, %1, %2;") UL(mul_wide_s32, "mul.wide.s32 %0, %1, %2;") UL(mad_wide_u32, "mad.wide.u32 %0, %1, %2, %3;") UL(mad_wide_s32, "mad.wide.s32 %0, %1, %2, %3;")
