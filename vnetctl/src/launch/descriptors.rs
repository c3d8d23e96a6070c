//! What a child inherits: exactly the descriptors that it is meant to have.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Makes `command`'s child inherit these descriptors, under their numbers here, and nothing else
/// above the standard streams. The descriptors must live until the child was spawned.
pub(super) fn inherit_only(command: &mut Command, keep: &[&OwnedFd]) {
    let keep: Vec<RawFd> = keep.iter().map(|fd| fd.as_raw_fd()).collect();
    let prepare = move || {
        close_on_exec_above_standard()?;
        for fd in &keep {
            set_inheritable(*fd)?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec. It allocates nothing, takes no lock and calls
    // only close_range, fcntl and getdtablesize, which are async-signal-safe or plain system calls.
    unsafe { command.pre_exec(prepare) };
}

/// Puts `command`'s child into a session of its own, away from the terminal and its signals.
pub(super) fn own_session(command: &mut Command) {
    let prepare = || {
        nix::unistd::setsid()?;
        Ok(())
    };
    // SAFETY: setsid is async-signal-safe (signal-safety(7)); nothing is allocated.
    unsafe { command.pre_exec(prepare) };
}

fn close_on_exec_above_standard() -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let (first, last, flags) = (FIRST_PRIVATE as u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        // SAFETY: plain integers; the call changes descriptor flags only.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
        if result == 0 {
            return Ok(());
        }
        // Linux before 5.11 does not know the flag: one by one, as elsewhere.
    }
    // SAFETY: takes and changes nothing.
    let limit = unsafe { libc::getdtablesize() }.min(DESCRIPTORS_SCANNED_MAX);
    for fd in FIRST_PRIVATE..limit {
        // SAFETY: F_SETFD on a number that is no descriptor fails with EBADF, which is meant here.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

fn set_inheritable(fd: RawFd) -> io::Result<()> {
    // SAFETY: clears the flags of one descriptor that the caller owns.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

const FIRST_PRIVATE: RawFd = 3;
/// Where close_range is missing, descriptors above this are not looked for.
const DESCRIPTORS_SCANNED_MAX: RawFd = 65_536;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_child_inherits_what_it_is_meant_to_and_nothing_else() {
        let kept = OwnedFd::from(File::open("/dev/null").unwrap());
        let leaked = OwnedFd::from(File::open("/dev/zero").unwrap());
        set_inheritable(leaked.as_raw_fd()).unwrap();
        let script = format!(
            "test -e /dev/fd/{} && ! test -e /dev/fd/{}",
            kept.as_raw_fd(),
            leaked.as_raw_fd()
        );
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).stdin(Stdio::null());

        inherit_only(&mut command, &[&kept]);

        assert!(command.status().unwrap().success(), "{script}");
    }
}
