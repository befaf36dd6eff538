"""Completions of MMX, SSE to SSE4.2, AES, SHA, AVX, AVX2, F16C and FMA instructions, and of LDMXCSR and STMXCSR.

Not here: instructions with an address for each element, masked moves (their memory operand is partly accessed), and
AVX-512.

Source: Intel SDM vol. 2, the instructions' pages; vol. 1 §10.2.3 (MXCSR).
"""

from functools import partial

from kvmpy.machine.assist import fpu
from kvmpy.machine.assist.context import GP, Completion, Context, Fault
from kvmpy.machine.assist.decode import Instruction
from kvmpy.machine.assist.native import find_operand, mxcsr_mask, require, run_natively
from kvmpy.machine.assist.rows import Row, find_row, parse

MOVES = """
NP 0F V,Wu sse avx avx: 10 movups
66 0F V,Wu sse2 avx avx: 10 movupd
F3 0F V,Wu sse2 avx avx: 6F movdqu
F2 0F V,Mu pni avx avx: F0 lddqu
NP 0F Wu,V sse avx avx: 11 movups
66 0F Wu,V sse2 avx avx: 11 movupd
F3 0F Wu,V sse2 avx avx: 7F movdqu
NP 0F V,Wa sse avx avx: 28 movaps
66 0F V,Wa sse2 avx avx: 28 movapd 6F movdqa
NP 0F Wa,V sse avx avx: 29 movaps
66 0F Wa,V sse2 avx avx: 29 movapd 7F movdqa
NP 0F Ma,V sse avx avx: 2B movntps
66 0F Ma,V sse2 avx avx: 2B movntpd E7 movntdq
66 0F38 V,Ma sse4_1 avx avx2: 2A movntdqa
F3 0F V,Md sse avx =: 10 movss
F3 0F V,H,U sse avx =: 10 movss
F3 0F Md,V sse avx =: 11 movss
F3 0F U,H,V sse avx =: 11 movss
F2 0F V,Mq sse2 avx =: 10 movsd
F2 0F V,H,U sse2 avx =: 10 movsd
F2 0F Mq,V sse2 avx =: 11 movsd
F2 0F U,H,V sse2 avx =: 11 movsd
NP 0F V,H,Mq sse avx -: 12 movlps 16 movhps
NP 0F V,H,U sse avx -: 12 movhlps 16 movlhps
66 0F V,H,Mq sse2 avx -: 12 movlpd 16 movhpd
NP 0F Mq,V sse avx -: 13 movlps 17 movhps
66 0F Mq,V sse2 avx -: 13 movlpd 17 movhpd
F3 0F V,Wx pni avx avx: 12 movsldup 16 movshdup
F2 0F V,Wq pni avx -: 12 movddup
F2 0F V,Wx - - avx: 12 vmovddup
66 0F V,Ey sse2 avx -: 6E movd
66 0F Ey,V sse2 avx -: 7E movd
F3 0F V,Wq sse2 avx -: 7E movq
66 0F Wq,V sse2 avx -: D6 movq
NP 0F G,U sse avx avx: 50 movmskps
66 0F G,U sse2 avx avx: 50 movmskpd
66 0F G,U sse2 avx avx2: D7 pmovmskb
NP 0F V,Md sse avx -: AE/2 ldmxcsr
NP 0F Md,V sse avx -: AE/3 stmxcsr
"""

FLOATS = """
NP 0F V,H,Wx sse avx avx: 14 unpcklps 15 unpckhps 54 andps 55 andnps 56 orps 57 xorps
NP 0F V,H,Wx sse avx avx: 58 addps 59 mulps 5C subps 5D minps 5E divps 5F maxps C2 cmpps C6 shufps
66 0F V,H,Wx sse2 avx avx: 14 unpcklpd 15 unpckhpd 54 andpd 55 andnpd 56 orpd 57 xorpd
66 0F V,H,Wx sse2 avx avx: 58 addpd 59 mulpd 5C subpd 5D minpd 5E divpd 5F maxpd C2 cmppd C6 shufpd
F3 0F V,H,Wd sse avx =: 51 sqrtss 52 rsqrtss 53 rcpss
F3 0F V,H,Wd sse avx =: 58 addss 59 mulss 5C subss 5D minss 5E divss 5F maxss C2 cmpss
F2 0F V,H,Wq sse2 avx =: 51 sqrtsd 58 addsd 59 mulsd 5C subsd 5D minsd 5E divsd 5F maxsd C2 cmpsd
NP 0F V,Wx sse avx avx: 51 sqrtps 52 rsqrtps 53 rcpps
66 0F V,Wx sse2 avx avx: 51 sqrtpd
NP 0F V,Wd sse avx =: 2E ucomiss 2F comiss
66 0F V,Wq sse2 avx =: 2E ucomisd 2F comisd
66 0F V,H,Wx pni avx avx: 7C haddpd 7D hsubpd D0 addsubpd
F2 0F V,H,Wx pni avx avx: 7C haddps 7D hsubps D0 addsubps
66 0F3A V,Wx sse4_1 avx avx: 08 roundps 09 roundpd
66 0F3A V,H,Wd sse4_1 avx =: 0A roundss
66 0F3A V,H,Wq sse4_1 avx =: 0B roundsd
66 0F3A V,H,Wx sse4_1 avx avx: 0C blendps 0D blendpd 40 dpps
66 0F3A V,H,Wx sse4_1 avx -: 41 dppd
66 0F3A V,H,Wd sse4_1 avx -: 21 insertps
66 0F3A Ed,V sse4_1 avx -: 17 extractps
F3 0F V,H,Ey sse avx =: 2A cvtsi2ss
F2 0F V,H,Ey sse2 avx =: 2A cvtsi2sd
F3 0F G,Wd sse avx =: 2C cvttss2si 2D cvtss2si
F2 0F G,Wq sse2 avx =: 2C cvttsd2si 2D cvtsd2si
F3 0F V,H,Wd sse2 avx =: 5A cvtss2sd
F2 0F V,H,Wq sse2 avx =: 5A cvtsd2ss
NP 0F V,Wh sse2 avx avx: 5A cvtps2pd
66 0F V,Wx sse2 avx avx: 5A cvtpd2ps 5B cvtps2dq E6 cvttpd2dq
NP 0F V,Wx sse2 avx avx: 5B cvtdq2ps
F3 0F V,Wx sse2 avx avx: 5B cvttps2dq
F3 0F V,Wh sse2 avx avx: E6 cvtdq2pd
F2 0F V,Wx sse2 avx avx: E6 cvtpd2dq
66 0F38 V,Wh - f16c f16c W0: 13 vcvtph2ps
66 0F3A Wh,V - f16c f16c W0: 1D vcvtps2ph
66 0F38 V,H,Wx - fma fma: 96 vfmaddsub132p 97 vfmsubadd132p A6 vfmaddsub213p A7 vfmsubadd213p
66 0F38 V,H,Wx - fma fma: B6 vfmaddsub231p B7 vfmsubadd231p 98 vfmadd132p 9A vfmsub132p 9C vfnmadd132p
66 0F38 V,H,Wx - fma fma: 9E vfnmsub132p A8 vfmadd213p AA vfmsub213p AC vfnmadd213p AE vfnmsub213p
66 0F38 V,H,Wx - fma fma: B8 vfmadd231p BA vfmsub231p BC vfnmadd231p BE vfnmsub231p
66 0F38 V,H,Wd - fma = W0: 99 vfmadd132ss 9B vfmsub132ss 9D vfnmadd132ss 9F vfnmsub132ss
66 0F38 V,H,Wd - fma = W0: A9 vfmadd213ss AB vfmsub213ss AD vfnmadd213ss AF vfnmsub213ss
66 0F38 V,H,Wd - fma = W0: B9 vfmadd231ss BB vfmsub231ss BD vfnmadd231ss BF vfnmsub231ss
66 0F38 V,H,Wq - fma = W1: 99 vfmadd132sd 9B vfmsub132sd 9D vfnmadd132sd 9F vfnmsub132sd
66 0F38 V,H,Wq - fma = W1: A9 vfmadd213sd AB vfmsub213sd AD vfnmadd213sd AF vfnmsub213sd
66 0F38 V,H,Wq - fma = W1: B9 vfmadd231sd BB vfmsub231sd BD vfnmadd231sd BF vfnmsub231sd
"""

INTEGERS = """
66 0F V,H,Wx sse2 avx avx2: 60 punpcklbw 61 punpcklwd 62 punpckldq 63 packsswb 64 pcmpgtb 65 pcmpgtw 66 pcmpgtd
66 0F V,H,Wx sse2 avx avx2: 67 packuswb 68 punpckhbw 69 punpckhwd 6A punpckhdq 6B packssdw 6C punpcklqdq
66 0F V,H,Wx sse2 avx avx2: 6D punpckhqdq 74 pcmpeqb 75 pcmpeqw 76 pcmpeqd D4 paddq D5 pmullw D8 psubusb D9 psubusw
66 0F V,H,Wx sse2 avx avx2: DA pminub DB pand DC paddusb DD paddusw DE pmaxub DF pandn E0 pavgb E3 pavgw
66 0F V,H,Wx sse2 avx avx2: E4 pmulhuw E5 pmulhw E8 psubsb E9 psubsw EA pminsw EB por EC paddsb ED paddsw EE pmaxsw
66 0F V,H,Wx sse2 avx avx2: EF pxor F4 pmuludq F5 pmaddwd F6 psadbw F8 psubb F9 psubw FA psubd FB psubq
66 0F V,H,Wx sse2 avx avx2: FC paddb FD paddw FE paddd
66 0F V,H,Wdq sse2 avx avx2: D1 psrlw D2 psrld D3 psrlq E1 psraw E2 psrad F1 psllw F2 pslld F3 psllq
66 0F H,U sse2 avx avx2: 71/2 psrlw 71/4 psraw 71/6 psllw 72/2 psrld 72/4 psrad 72/6 pslld
66 0F H,U sse2 avx avx2: 73/2 psrlq 73/3 psrldq 73/6 psllq 73/7 pslldq
66 0F V,Wx sse2 avx avx2: 70 pshufd
F3 0F V,Wx sse2 avx avx2: 70 pshufhw
F2 0F V,Wx sse2 avx avx2: 70 pshuflw
66 0F V,H,Ew sse2 avx -: C4 pinsrw
66 0F G,U sse2 avx -: C5 pextrw
66 0F38 V,H,Wx ssse3 avx avx2: 00 pshufb 01 phaddw 02 phaddd 03 phaddsw 04 pmaddubsw 05 phsubw 06 phsubd
66 0F38 V,H,Wx ssse3 avx avx2: 07 phsubsw 08 psignb 09 psignw 0A psignd 0B pmulhrsw
66 0F38 V,Wx ssse3 avx avx2: 1C pabsb 1D pabsw 1E pabsd
66 0F3A V,H,Wx ssse3 avx avx2: 0F palignr
66 0F38 V,Wx sse4_1 - -: 10 pblendvb 14 blendvps 15 blendvpd
66 0F38 V,Wx sse4_1 avx avx: 17 ptest
66 0F38 V,Wh sse4_1 avx avx2: 20 pmovsxbw 23 pmovsxwd 25 pmovsxdq 30 pmovzxbw 33 pmovzxwd 35 pmovzxdq
66 0F38 V,Wf sse4_1 avx avx2: 21 pmovsxbd 24 pmovsxwq 31 pmovzxbd 34 pmovzxwq
66 0F38 V,We sse4_1 avx avx2: 22 pmovsxbq 32 pmovzxbq
66 0F38 V,H,Wx sse4_1 avx avx2: 28 pmuldq 29 pcmpeqq 2B packusdw 38 pminsb 39 pminsd 3A pminuw 3B pminud
66 0F38 V,H,Wx sse4_1 avx avx2: 3C pmaxsb 3D pmaxsd 3E pmaxuw 3F pmaxud 40 pmulld
66 0F38 V,H,Wx sse4_2 avx avx2: 37 pcmpgtq
66 0F38 V,Wx sse4_1 avx -: 41 phminposuw
66 0F3A V,H,Wx sse4_1 avx avx2: 0E pblendw 42 mpsadbw
66 0F3A Eb,V sse4_1 avx -: 14 pextrb
66 0F3A Ew,V sse4_1 avx -: 15 pextrw
66 0F3A Ey,V sse4_1 avx -: 16 pextrd
66 0F3A V,H,Eb sse4_1 avx -: 20 pinsrb
66 0F3A V,H,Ey sse4_1 avx -: 22 pinsrd
66 0F3A V,Wudq sse4_2 avx -: 60 pcmpestrm 61 pcmpestri 62 pcmpistrm 63 pcmpistri
66 0F38 V,Wx aes aes -: DB aesimc
66 0F3A V,Wx aes aes -: DF aeskeygenassist
66 0F38 V,H,Wx aes aes vaes: DC aesenc DD aesenclast DE aesdec DF aesdeclast
66 0F3A V,H,Wx pclmulqdq pclmulqdq vpclmulqdq: 44 pclmulqdq
NP 0F38 V,Wx sha_ni - -: C8 sha1nexte C9 sha1msg1 CA sha1msg2 CB sha256rnds2 CC sha256msg1 CD sha256msg2
NP 0F3A V,Wx sha_ni - -: CC sha1rnds4
66 0F38 V,Wx gfni - -: CF gf2p8mulb
66 0F38 V,H,Wx - gfni gfni W0: CF vgf2p8mulb
66 0F3A V,Wx gfni - -: CE gf2p8affineqb CF gf2p8affineinvqb
66 0F3A V,H,Wx - gfni gfni W1: CE vgf2p8affineqb CF vgf2p8affineinvqb
"""

AVX = """
NP 0F V - avx -: 77 vzeroupper
NP 0F V - - avx: 77 vzeroall
66 0F38 V,H,Wx - avx avx W0: 0C vpermilps 0D vpermilpd
66 0F3A V,Wx - avx avx W0: 04 vpermilps 05 vpermilpd
66 0F38 V,Wx - avx avx W0: 0E vtestps 0F vtestpd
66 0F38 V,Md - avx avx W0: 18 vbroadcastss
66 0F38 V,U - avx2 avx2 W0: 18 vbroadcastss
66 0F38 V,Mq - - avx W0: 19 vbroadcastsd
66 0F38 V,U - - avx2 W0: 19 vbroadcastsd
66 0F38 V,Mdq - - avx W0: 1A vbroadcastf128
66 0F38 V,Mdq - - avx2 W0: 5A vbroadcasti128
66 0F38 V,Wb - avx2 avx2 W0: 78 vpbroadcastb
66 0F38 V,Ww - avx2 avx2 W0: 79 vpbroadcastw
66 0F38 V,Wd - avx2 avx2 W0: 58 vpbroadcastd
66 0F38 V,Wq - avx2 avx2 W0: 59 vpbroadcastq
66 0F38 V,H,Wx - - avx2 W0: 16 vpermps 36 vpermd
66 0F38 V,H,Wx - avx2 avx2: 45 vpsrlv 47 vpsllv
66 0F38 V,H,Wx - avx2 avx2 W0: 46 vpsravd
66 0F38 V,H,Wx - avx_vnni avx_vnni W0: 50 vpdpbusd 51 vpdpbusds 52 vpdpwssd 53 vpdpwssds
66 0F3A V,Wx - - avx2 W1: 00 vpermq 01 vpermpd
66 0F3A V,H,Wx - avx2 avx2 W0: 02 vpblendd
66 0F3A V,H,Wx - - avx W0: 06 vperm2f128
66 0F3A V,H,Wx - - avx2 W0: 46 vperm2i128
66 0F3A V,H,Wdq - - avx W0: 18 vinsertf128
66 0F3A V,H,Wdq - - avx2 W0: 38 vinserti128
66 0F3A Wdq,V - - avx W0: 19 vextractf128
66 0F3A Wdq,V - - avx2 W0: 39 vextracti128
66 0F3A V,H,Wx,L - avx avx W0: 4A vblendvps 4B vblendvpd
66 0F3A V,H,Wx,L - avx avx2 W0: 4C vpblendvb
"""

MMX = """
NP 0F P,Qd mmx - -: 60 punpcklbw 61 punpcklwd 62 punpckldq
NP 0F P,Qq mmx - -: 63 packsswb 64 pcmpgtb 65 pcmpgtw 66 pcmpgtd 67 packuswb 68 punpckhbw 69 punpckhwd 6A punpckhdq
NP 0F P,Qq mmx - -: 6B packssdw 6F movq 74 pcmpeqb 75 pcmpeqw 76 pcmpeqd D1 psrlw D2 psrld D3 psrlq D5 pmullw
NP 0F P,Qq mmx - -: D8 psubusb D9 psubusw DB pand DC paddusb DD paddusw DF pandn E1 psraw E2 psrad E5 pmulhw
NP 0F P,Qq mmx - -: E8 psubsb E9 psubsw EB por EC paddsb ED paddsw EF pxor F1 psllw F2 pslld F3 psllq F5 pmaddwd
NP 0F P,Qq mmx - -: F8 psubb F9 psubw FA psubd FC paddb FD paddw FE paddd
NP 0F P,Qq sse - -: 70 pshufw DA pminub DE pmaxub E0 pavgb E3 pavgw E4 pmulhuw EA pminsw EE pmaxsw F6 psadbw
NP 0F P,Qq sse2 - -: D4 paddq F4 pmuludq FB psubq
NP 0F N mmx - -: 71/2 psrlw 71/4 psraw 71/6 psllw 72/2 psrld 72/4 psrad 72/6 pslld 73/2 psrlq 73/6 psllq
NP 0F Qq,P mmx - -: 7F movq
NP 0F P,Ey mmx - -: 6E movd
NP 0F Ey,P mmx - -: 7E movd
NP 0F Mq,P sse - -: E7 movntq
NP 0F P,Ew sse - -: C4 pinsrw
NP 0F G,N sse - -: C5 pextrw D7 pmovmskb
NP 0F P mmx - -: 77 emms
NP 0F38 P,Qq ssse3 - -: 00 pshufb 01 phaddw 02 phaddd 03 phaddsw 04 pmaddubsw 05 phsubw 06 phsubd 07 phsubsw
NP 0F38 P,Qq ssse3 - -: 08 psignb 09 psignw 0A psignd 0B pmulhrsw 1C pabsb 1D pabsw 1E pabsd
NP 0F3A P,Qq ssse3 - -: 0F palignr
F3 0F V,N sse2 - -: D6 movq2dq
F2 0F P,U sse2 - -: D6 movdq2q
NP 0F V,Qq sse - -: 2A cvtpi2ps
66 0F V,N sse2 - -: 2A cvtpi2pd
66 0F V,Mq sse2 - -: 2A cvtpi2pd
NP 0F P,Wq sse - -: 2C cvttps2pi 2D cvtps2pi
66 0F P,Wx sse2 - -: 2C cvttpd2pi 2D cvtpd2pi
"""

TABLE = parse(MOVES + FLOATS + INTEGERS + AVX + MMX)


def find(instruction: Instruction) -> Completion | None:
    """Return how to complete ``instruction``, if it is one of these."""
    row = find_row(TABLE, instruction)
    return Completion(row.name, partial(_SPECIAL.get(row.name, run_natively), row)) if row else None


def _ldmxcsr(row: Row, context: Context) -> None:
    require(context, row)
    state = fpu.load(context, row)
    data = b"".join(context.memory.read(gpa, length) for gpa, length in find_operand(context, row))
    value = int.from_bytes(data, "little")
    if value & ~mxcsr_mask():
        raise Fault(GP, 0)
    assert state
    state.mxcsr = value
    state.store()


def _stmxcsr(row: Row, context: Context) -> None:
    require(context, row)
    state = fpu.load(context, row)
    assert state
    context.write_operand(state.mxcsr.to_bytes(4, "little"))


# Of these the host would load or tell its own MXCSR.
_SPECIAL = {"ldmxcsr": _ldmxcsr, "vldmxcsr": _ldmxcsr, "stmxcsr": _stmxcsr, "vstmxcsr": _stmxcsr}
