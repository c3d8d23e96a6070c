//! The filter on a command's system calls (seccomp(2)): doors beside the network namespace, which it closes,
//! and calls that are looked at elsewhere.
//!
//! - `AF_VSOCK` does not know network namespaces: inside a virtual machine it leads to the machine's host. It
//!   looks to the command as on a kernel without it.
//! - io_uring makes and connects sockets without passing this filter, so it looks absent as well; programs fall
//!   back, as they do under the container engines.
//! - connect(2) and listen(2) are told to the listener, see `sockets`. Unix datagram sockets cannot be made,
//!   because what they are sent to cannot be looked at; of pairs of them the listener is told.
//! - The 32-bit x86 `socketcall` hides its arguments from a filter: it makes, connects and opens no sockets.
//!   Libraries of the last ten years use the plain calls.

use std::os::fd::{FromRawFd as _, OwnedFd};

use nix::errno::Errno;

/// Puts the filter on this process and all it will start; gives the descriptor where the calls are told that
/// are to be looked at. Needs no_new_privs.
///
/// # Errors
/// `EBUSY` where a filter is in force that has a listener of its own, as inside another run; `ENOSYS` where
/// the processor's calls are not known here, or the kernel has no such filters.
pub(crate) fn confine() -> nix::Result<OwnedFd> {
    let program = filter();
    if program.is_empty() {
        return Err(Errno::ENOSYS);
    }
    let program = libc::sock_fprog {
        // The filter has some hundred instructions.
        len: program.len() as libc::c_ushort,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program lives until the call returns; the kernel copies and checks it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    match Errno::result(fd) {
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
        // A kernel without filters, or before the listener (5.0).
        Err(Errno::EINVAL) => Err(Errno::ENOSYS),
        Err(error) => Err(error),
    }
}

/// A call that the listener is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// connect(2).
    Connect,
    /// listen(2).
    Listen,
    /// socketpair(2) of Unix datagram sockets.
    DatagramPair,
}

impl Call {
    /// Which call this number is.
    pub(crate) fn of(audit: u32, number: u32) -> Option<Call> {
        let arch = ARCHES.iter().find(|arch| arch.audit == audit)?;
        match number & !X32_BIT {
            number if number == arch.connect => Some(Call::Connect),
            number if number == arch.listen => Some(Call::Listen),
            number if number == arch.socketpair => Some(Call::DatagramPair),
            _ => None,
        }
    }
}

/// One processor architecture's numbers.
struct Arch {
    /// `AUDIT_ARCH_*`.
    audit: u32,
    socket: u32,
    socketpair: u32,
    connect: u32,
    listen: u32,
    /// Where there is one.
    socketcall: Option<u32>,
}

#[cfg(target_arch = "x86_64")]
const ARCHES: &[Arch] = &[
    Arch {
        audit: 0xc000_003e,
        socket: 41,
        socketpair: 53,
        connect: 42,
        listen: 50,
        socketcall: None,
    },
    Arch {
        audit: 0x4000_0003,
        socket: 359,
        socketpair: 360,
        connect: 362,
        listen: 363,
        socketcall: Some(102),
    },
];
#[cfg(target_arch = "aarch64")]
const ARCHES: &[Arch] = &[
    Arch {
        audit: 0xc000_00b7,
        socket: 198,
        socketpair: 199,
        connect: 203,
        listen: 201,
        socketcall: None,
    },
    Arch {
        audit: 0x4000_0028,
        socket: 281,
        socketpair: 288,
        connect: 283,
        listen: 284,
        socketcall: Some(102),
    },
];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHES: &[Arch] = &[];

/// The same number everywhere.
const IO_URING_SETUP: u32 = 425;
/// x32 calls are those of x86-64 with this bit.
const X32_BIT: u32 = 0x4000_0000;
/// `socketcall`'s sub-calls (linux/net.h): socket, connect, listen, socketpair.
const SOCKETCALLS: [u32; 4] = [1, 3, 4, 8];
/// Of a socket's type: `SOCK_CLOEXEC` and `SOCK_NONBLOCK` lie above.
const TYPE_MASK: u32 = 0xf;

/// The filter: for each architecture a block that ends in a return.
fn filter() -> Vec<libc::sock_filter> {
    // Offsets in `struct seccomp_data`; the architectures above are little-endian.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    const FIRST_ARGUMENT: u32 = 16;
    const SECOND_ARGUMENT: u32 = 24;
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const TELL: u32 = libc::SECCOMP_RET_USER_NOTIF;
    const UNKNOWN_FAMILY: u32 = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
    const UNKNOWN_TYPE: u32 = libc::SECCOMP_RET_ERRNO | libc::ESOCKTNOSUPPORT as u32;
    const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    let mut program = Vec::new();
    for arch in ARCHES {
        let mut block = vec![statement(LOAD, NUMBER), statement(AND, !X32_BIT)];
        // Each test runs into its consequence, or jumps over it.
        for (call, outcome) in [
            (IO_URING_SETUP, NO_SUCH_CALL),
            (arch.connect, TELL),
            (arch.listen, TELL),
        ] {
            block.extend([unless_equal(call, 1), statement(RETURN, outcome)]);
        }
        if let Some(socketcall) = arch.socketcall {
            let mut calls = vec![statement(LOAD, FIRST_ARGUMENT)];
            for call in SOCKETCALLS {
                calls.extend([unless_equal(call, 1), statement(RETURN, NO_SUCH_CALL)]);
            }
            calls.push(statement(RETURN, ALLOW));
            push_case(&mut block, socketcall, calls);
        }
        for (call, datagrams) in [(arch.socket, UNKNOWN_TYPE), (arch.socketpair, TELL)] {
            let mut made = vec![
                statement(LOAD, FIRST_ARGUMENT),
                unless_equal(libc::AF_VSOCK as u32, 1),
                statement(RETURN, UNKNOWN_FAMILY),
                // Any other family: past what follows, to the last return.
                unless_equal(libc::AF_UNIX as u32, 6),
                statement(LOAD, SECOND_ARGUMENT),
                statement(AND, TYPE_MASK),
            ];
            // The kernel makes a datagram socket of a raw one.
            for kind in [libc::SOCK_DGRAM, libc::SOCK_RAW] {
                made.extend([unless_equal(kind as u32, 1), statement(RETURN, datagrams)]);
            }
            made.push(statement(RETURN, ALLOW));
            push_case(&mut block, call, made);
        }
        block.push(statement(RETURN, ALLOW));
        program.push(statement(LOAD, ARCH));
        push_case(&mut program, arch.audit, block);
    }
    if !program.is_empty() {
        // Calls whose numbers are not known could be any.
        program.push(statement(RETURN, NO_SUCH_CALL));
    }
    program
}

/// What happens if the accumulator is `k`; it ends in a return.
fn push_case(program: &mut Vec<libc::sock_filter>, k: u32, then: Vec<libc::sock_filter>) {
    // A block is far shorter than a jump can be.
    program.push(unless_equal(k, then.len() as u8));
    program.extend(then);
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
