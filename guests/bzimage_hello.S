# bzimage_hello.S -- looks like Linux from outside
#
# Teaches:   the setup header, and a 64-bit entry 0x200 behind the start   (Linux, Documentation/arch/x86/boot.rst)
# Mode:      bzImage, long mode
# Run:       --append penguin
# Memory:    0x100000 code, behind two sectors that stay in the file   %rsi boot_params
# Exits:     IoOut port=0xe9 x22 ; IoOut port=0xf4
# Prints:    64-bit entry: penguin
# Exercise:  print boot_params.e820_entries (offset 0x1e8), then the table itself (offset 0x2d0, 20 bytes an entry).
#include "abi.h"

#define PROTOCOL                0x020f
#define LOADED_HIGH             0x01
#define XLF_KERNEL_64           0x01
#define COMMAND_LINE_SIZE       255
#define BP_CMD_LINE_PTR         0x228
#define KERNEL                  0x100000
#define ALIGNMENT               0x100000
#define INIT_SIZE               0x10000

# One boot sector and one sector of real-mode code: nobody runs them here. The header begins at 0x1f1.
        .section .boot, "ax"
image:  .org    0x1f1
        .byte   1                       # setup_sects
        .word   0                       # root_flags
        .long   (kernel_size + 15) / 16 # syssize, in paragraphs
        .word   0, 0, 0                 # ram_size, vid_mode, root_dev
        .word   0xaa55
        .byte   0xeb, setup_code - 1f   # the jump over the header; its length is the header's
1:      .ascii  "HdrS"
        .word   PROTOCOL
        .long   0                       # realmode_swtch
        .word   0, 0                    # start_sys_seg, kernel_version
        .byte   0, LOADED_HIGH          # type_of_loader, loadflags
        .word   0                       # setup_move_size
        .long   KERNEL                  # code32_start
        .long   0, 0, 0                 # ramdisk_image, ramdisk_size, bootsect_kludge
        .word   0                       # heap_end_ptr
        .byte   0, 0                    # ext_loader_ver, ext_loader_type
        .long   0, 0x7fffffff           # cmd_line_ptr, initrd_addr_max
        .long   ALIGNMENT               # kernel_alignment
        .byte   1, 20                   # relocatable_kernel, min_alignment
        .word   XLF_KERNEL_64           # xloadflags
        .long   COMMAND_LINE_SIZE       # cmdline_size
        .long   0                       # hardware_subarch
        .quad   0                       # hardware_subarch_data
        .long   0, 0                    # payload_offset, payload_length
        .quad   0, KERNEL               # setup_data, pref_address
        .long   INIT_SIZE, 0, 0         # init_size, handover_offset, kernel_info_offset
setup_code:
        .org    0x400

# The kernel proper. Its first 512 bytes are for the 32-bit entry, which we do not have.
        .text
kernel: .skip   0x200
        .code64
        .globl  _start
_start:
        movl    $stack_end, %esp
        movq    %rsi, %rbx              # boot_params
        movl    $text, %esi
        call    puts
        movl    BP_CMD_LINE_PTR(%rbx), %esi
        call    puts
        movb    $'\n', %al
        outb    %al, $KVMPY_PORT_CONSOLE
        jmp     finish

text:   .asciz  "64-bit entry: "

#include "console.inc"

        .data
        .balign 16
        .skip   256
stack_end:
        .set    kernel_size, 0x1000
