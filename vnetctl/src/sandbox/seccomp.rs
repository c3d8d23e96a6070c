//! Doors beside the network namespace, closed by a system call filter (seccomp(2)).
//!
//! `AF_VSOCK` does not know network namespaces: inside a virtual machine it leads to the machine's host.
//! It looks to the command as on a kernel without it. io_uring makes sockets without passing this
//! filter, so it looks absent as well; programs fall back, as they do under the container engines.
//! The 32-bit x86 `socketcall` hides its arguments from a filter and cannot make sockets; libraries
//! of the last ten years use `socket`.

use nix::errno::Errno;

/// Puts the filter on this process and all it will start. Needs no_new_privs.
pub(crate) fn confine() -> nix::Result<()> {
    let program = filter();
    if program.is_empty() {
        return Ok(());
    }
    let program = libc::sock_fprog {
        // The filter has some twenty instructions.
        len: program.len() as libc::c_ushort,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program lives until the call returns; the kernel copies and checks it.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    match Errno::result(done) {
        Ok(_) => Ok(()),
        // A kernel without filters; nothing else that the guest is promised rests on it.
        Err(Errno::EINVAL) => Ok(()),
        Err(error) => Err(error),
    }
}

/// One processor architecture's numbers.
struct Arch {
    /// `AUDIT_ARCH_*`.
    audit: u32,
    socket: u32,
    socketpair: u32,
    /// Where there is one.
    socketcall: Option<u32>,
}

#[cfg(target_arch = "x86_64")]
const ARCHES: &[Arch] = &[
    Arch {
        audit: 0xc000_003e,
        socket: 41,
        socketpair: 53,
        socketcall: None,
    },
    Arch {
        audit: 0x4000_0003,
        socket: 359,
        socketpair: 360,
        socketcall: Some(102),
    },
];
#[cfg(target_arch = "aarch64")]
const ARCHES: &[Arch] = &[
    Arch {
        audit: 0xc000_00b7,
        socket: 198,
        socketpair: 199,
        socketcall: None,
    },
    Arch {
        audit: 0x4000_0028,
        socket: 281,
        socketpair: 288,
        socketcall: Some(102),
    },
];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHES: &[Arch] = &[];

/// The same number everywhere.
const IO_URING_SETUP: u32 = 425;
/// x32 calls are those of x86-64 with this bit.
const X32_BIT: u32 = 0x4000_0000;
/// `socketcall`'s sub-call that makes a socket.
const SOCKETCALL_SOCKET: u32 = 1;

/// The filter: for each architecture a block that ends in a return.
fn filter() -> Vec<libc::sock_filter> {
    // Offsets in `struct seccomp_data`; the architectures above are little-endian.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    const FIRST_ARGUMENT: u32 = 16;
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const UNKNOWN_FAMILY: u32 = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
    const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    let mut program = Vec::new();
    for arch in ARCHES {
        let mut block = vec![
            statement(LOAD, NUMBER),
            statement(AND, !X32_BIT),
            // Each test runs into its consequence, or jumps over it.
            unless_equal(IO_URING_SETUP, 1),
            statement(RETURN, NO_SUCH_CALL),
        ];
        if let Some(socketcall) = arch.socketcall {
            block.extend([
                unless_equal(socketcall, 4),
                statement(LOAD, FIRST_ARGUMENT),
                unless_equal(SOCKETCALL_SOCKET, 1),
                statement(RETURN, NO_SUCH_CALL),
                statement(RETURN, ALLOW),
            ]);
        }
        for call in [arch.socket, arch.socketpair] {
            block.extend([
                unless_equal(call, 4),
                statement(LOAD, FIRST_ARGUMENT),
                unless_equal(libc::AF_VSOCK as u32, 1),
                statement(RETURN, UNKNOWN_FAMILY),
                statement(RETURN, ALLOW),
            ]);
        }
        block.push(statement(RETURN, ALLOW));
        program.push(statement(LOAD, ARCH));
        // A block is far shorter than a jump can be.
        program.push(unless_equal(arch.audit, block.len() as u8));
        program.extend(block);
    }
    if !program.is_empty() {
        program.push(statement(RETURN, ALLOW));
    }
    program
}

/// An instruction that does not jump.
fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Jumps over so many instructions unless the accumulator is `k`.
fn unless_equal(k: u32, over: u8) -> libc::sock_filter {
    let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: over,
        k,
    }
}
