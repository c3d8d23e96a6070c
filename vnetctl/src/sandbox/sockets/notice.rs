//! System calls that the filter stopped, as the kernel tells them: seccomp_unotify(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::sandbox::seccomp::Call;

/// A call that waits for an answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Notice {
    id: u64,
    /// The thread that calls, in the numbers of this process's PID namespace.
    pub(super) thread: i32,
    /// Which call it is; `None` for one that the filter does not tell of.
    pub(super) call: Option<Call>,
    /// Its first arguments.
    pub(super) arguments: [u64; 4],
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It was done in the caller's stead.
    Done,
    /// It fails.
    Failed(Errno),
    /// The kernel does it, with the arguments as they are by then.
    GoOn,
}

/// Where calls are told.
#[derive(Debug)]
pub(super) struct Listener(OwnedFd);

impl Listener {
    /// Takes the descriptor that the filter came with.
    ///
    /// # Errors
    /// This kernel tells more than is known here.
    pub(super) fn new(fd: OwnedFd) -> nix::Result<Listener> {
        let mut sizes = libc::seccomp_notif_sizes {
            seccomp_notif: 0,
            seccomp_notif_resp: 0,
            seccomp_data: 0,
        };
        // SAFETY: writes the three sizes that it is given room for.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_GET_NOTIF_SIZES,
                0,
                &raw mut sizes,
            )
        })?;
        let known = usize::from(sizes.seccomp_notif) <= size_of::<Told>()
            && usize::from(sizes.seccomp_notif_resp) <= size_of::<Reply>();
        if known {
            Ok(Listener(fd))
        } else {
            Err(Errno::E2BIG)
        }
    }

    /// Takes the next call; to be called when there is one.
    pub(super) fn receive(&self) -> nix::Result<Notice> {
        // SAFETY: all zeroes is what the kernel demands, and a value of this plain struct.
        let mut told: Told = unsafe { std::mem::zeroed() };
        // SAFETY: writes as much as the size asked for in `new`, for which there is room.
        Errno::result(unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_RECV as _,
                &raw mut told,
            )
        })?;
        let libc::seccomp_notif { id, pid, data, .. } = told.notif;
        let [first, second, third, fourth, ..] = data.args;
        Ok(Notice {
            id,
            // A thread's number fits by the kernel's own types.
            thread: pid as i32,
            // A call number is not negative.
            call: Call::of(data.arch, data.nr as u32),
            arguments: [first, second, third, fourth],
        })
    }

    /// Whether the thread still waits in this call, and did all the time since it was told.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn is_valid(&self, notice: &Notice) -> nix::Result<()> {
        // SAFETY: reads the id that it is given.
        Errno::result(unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ID_VALID as _,
                &raw const notice.id,
            )
        })
        .map(drop)
    }

    /// Gives the caller a copy of a descriptor, and its number there: Linux 5.9.
    pub(super) fn give(&self, notice: &Notice, fd: &OwnedFd, close_on_exec: bool) -> nix::Result<i32> {
        let given = libc::seccomp_notif_addfd {
            id: notice.id,
            flags: 0,
            // A descriptor is not negative.
            srcfd: fd.as_raw_fd() as u32,
            newfd: 0,
            newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        // SAFETY: reads the struct that it is given, whose size is part of the request.
        Errno::result(unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_ADDFD as _,
                &raw const given,
            )
        })
    }

    /// Ends a call. If a signal has taken the caller out of it, there is nobody to be told.
    pub(super) fn answer(&self, notice: &Notice, answer: Answer) {
        // SAFETY: all zeroes is a value of this plain struct.
        let mut reply: Reply = unsafe { std::mem::zeroed() };
        reply.resp.id = notice.id;
        match answer {
            Answer::Done => {}
            Answer::Failed(errno) => reply.resp.error = -(errno as i32),
            Answer::GoOn => reply.resp.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: reads as much as the size asked for in `new`.
        unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND as _,
                &raw const reply,
            )
        };
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Room for what a later kernel adds.
#[repr(C)]
struct Told {
    notif: libc::seccomp_notif,
    later: [u64; 16],
}

/// Likewise; what is not known is left zero.
#[repr(C)]
struct Reply {
    resp: libc::seccomp_notif_resp,
    later: [u64; 16],
}
