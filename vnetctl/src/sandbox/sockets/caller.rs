//! The thread that makes a call: its socket, the address in its memory, and what a path means to it.
//!
//! Everything here is of use only while [`Listener::is_valid`](super::notice::Listener::is_valid) holds after
//! it was taken: until then the number may have become another thread's.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::{Pid, chroot, fchdir};

use crate::sandbox::{caps, sys};

/// The largest address of any family, `struct sockaddr_storage`.
const ADDRESS_MAX_BYTES: usize = 128;
/// `sun_family` comes before the path.
const PATH_AT: usize = 2;
/// How much of `/proc/PID/status` is read; a list of groups may be long.
const STATUS_MAX_BYTES: u64 = 64 * 1024;

/// An address as a command gave it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// The path of a Unix socket.
    Path(Vec<u8>),
    /// Any other, as it is: another family, an abstract name, nothing.
    Other(Vec<u8>),
}

impl Address {
    fn of(bytes: Vec<u8>) -> Address {
        let unix = bytes
            .first_chunk::<PATH_AT>()
            .is_some_and(|family| i32::from(u16::from_ne_bytes(*family)) == libc::AF_UNIX);
        match bytes.get(PATH_AT) {
            Some(first) if unix && *first != 0 => {
                let path = &bytes[PATH_AT..];
                let end = path.iter().position(|byte| *byte == 0).unwrap_or(path.len());
                Address::Path(path[..end].to_vec())
            }
            _ => Address::Other(bytes),
        }
    }
}

/// The bytes of `struct sockaddr_un` for this path.
pub(super) fn unix_address(path: &[u8]) -> Vec<u8> {
    // The family fits: it is 1.
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(path);
    bytes.push(0);
    bytes
}

/// Does something without the capabilities that the helper has over the run, as the command could.
pub(super) fn unprivileged<T>(what: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
    caps::lay_down()?;
    let done = what();
    caps::take_up()?;
    done
}

/// A thread that waits in a call.
#[derive(Debug)]
pub(super) struct Caller {
    thread: i32,
    process: OwnedFd,
}

impl Caller {
    /// Holds the thread of this number.
    pub(super) fn find(proc: &OwnedFd, thread: i32) -> nix::Result<Caller> {
        let process = match sys::pidfd_of_thread(Pid::from_raw(thread)) {
            // A kernel that has descriptors for processes only.
            Err(Errno::EINVAL) => {
                let status = read(proc, &format!("{thread}/status"))?;
                let group = field(&status, "Tgid:").and_then(|number| number.parse().ok());
                sys::pidfd(Pid::from_raw(group.ok_or(Errno::ESRCH)?))?
            }
            other => other?,
        };
        Ok(Caller { thread, process })
    }

    /// Becomes readable when it ends.
    pub(super) fn process(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    /// A copy of its descriptor: pidfd_getfd(2), Linux 5.6.
    pub(super) fn take_socket(&self, argument: u64) -> nix::Result<OwnedFd> {
        // The kernel takes an int and ignores the rest of the register.
        sys::pidfd_getfd(self.process.as_fd(), argument as i32)
    }

    /// Copies an address from its memory.
    pub(super) fn read_address(&self, at: u64, length: u64) -> nix::Result<Address> {
        // The kernel takes an int and ignores the rest of the register.
        let length = usize::try_from(length as i32).map_err(|_| Errno::EINVAL)?;
        if length > ADDRESS_MAX_BYTES {
            return Err(Errno::EINVAL);
        }
        let mut bytes = vec![0; length];
        if length > 0 {
            let base = usize::try_from(at).map_err(|_| Errno::EFAULT)?;
            let from = [RemoteIoVec { base, len: length }];
            let copied = process_vm_readv(
                Pid::from_raw(self.thread),
                &mut [IoSliceMut::new(&mut bytes)],
                &from,
            )?;
            if copied != length {
                return Err(Errno::EFAULT);
            }
        }
        Ok(Address::of(bytes))
    }

    /// Writes two numbers into its memory.
    pub(super) fn write_pair(&self, at: u64, numbers: [i32; 2]) -> nix::Result<()> {
        let bytes = numbers.map(i32::to_ne_bytes).concat();
        let base = usize::try_from(at).map_err(|_| Errno::EFAULT)?;
        let to = [RemoteIoVec {
            base,
            len: bytes.len(),
        }];
        let written = process_vm_writev(Pid::from_raw(self.thread), &[IoSlice::new(&bytes)], &to)?;
        if written == bytes.len() {
            Ok(())
        } else {
            Err(Errno::EFAULT)
        }
    }

    /// The file that a path means to it, links followed, held. The root of this process becomes the caller's.
    pub(super) fn resolve(&self, proc: &OwnedFd, path: &[u8]) -> nix::Result<OwnedFd> {
        let open = |name: &str| {
            let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY;
            let path = format!("{}/{name}", self.thread);
            openat(proc, path.as_str(), flags, Mode::empty())
        };
        let (root, directory) = (open("root")?, open("cwd")?);
        let path = self.without_self(proc, path)?;
        fchdir(&root)?;
        chroot(".")?;
        fchdir(&directory)?;
        let path = Path::new(std::ffi::OsStr::from_bytes(&path));
        let found = unprivileged(|| {
            let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
            nix::fcntl::open(path, flags, Mode::empty())
        });
        fchdir(proc)?;
        found
    }

    /// `/proc/self` would be this process: it is the caller that is meant. Programs name sockets so whose path
    /// is longer than an address.
    fn without_self(&self, proc: &OwnedFd, path: &[u8]) -> nix::Result<Vec<u8>> {
        for own in [&b"/proc/self/"[..], b"/proc/thread-self/"] {
            if let Some(rest) = path.strip_prefix(own) {
                let status = read(proc, &format!("{}/status", self.thread))?;
                let number = field(&status, "NStgid:").ok_or(Errno::ENOENT)?;
                return Ok([b"/proc/", number.as_bytes(), b"/", rest].concat());
            }
        }
        Ok(path.to_vec())
    }
}

/// The last word of a line of `/proc/PID/status`: of numbers in several namespaces the innermost.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().last()
}

fn read(proc: &OwnedFd, path: &str) -> nix::Result<String> {
    let fd = openat(proc, path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut text = Vec::new();
    File::from(fd)
        .take(STATUS_MAX_BYTES)
        .read_to_end(&mut text)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    // The name of a thread may hold anything.
    Ok(String::from_utf8_lossy(&text).into_owned())
}
