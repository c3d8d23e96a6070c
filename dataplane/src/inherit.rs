//! Descriptors that a parent handed down by number, and the lifeline made of one.

use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes an inherited descriptor, and keeps it from being inherited further. Each number may be taken
/// once; the configuration sees to it that no two flags name the same.
///
/// # Errors
/// The host's error when no such descriptor is open.
pub fn take(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `from_raw_fd` needs an open descriptor that nobody else owns. It is one that the parent
    // left open for this process alone and named in a flag; nothing in this process has opened it, and
    // it is wrapped here once. That it is open is checked next; if it is not, it is never closed.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    match fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(owned),
        Err(error) => {
            std::mem::forget(owned);
            Err(error.into())
        }
    }
}

/// Takes standard input and output, each a pipe or a socket, and puts nothing in their place: whatever this
/// process still writes there is lost, and who holds their other ends sees them closed with ours.
///
/// # Errors
/// The host's error, and for a terminal, a file or a device.
pub fn take_stdio() -> io::Result<(OwnedFd, OwnedFd)> {
    let (input, output) = (io::stdin(), io::stdout());
    for (what, fd) in [
        ("standard input", input.as_fd()),
        ("standard output", output.as_fd()),
    ] {
        let kind = nix::sys::stat::fstat(fd)?.st_mode & libc::S_IFMT;
        if kind != libc::S_IFIFO && kind != libc::S_IFSOCK {
            let text = format!("{what} is neither");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
    }
    let taken = (
        input.as_fd().try_clone_to_owned()?,
        output.as_fd().try_clone_to_owned()?,
    );
    let nothing = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&nothing)?;
    nix::unistd::dup2_stdout(&nothing)?;
    Ok(taken)
}

/// Whether a descriptor is open and was inherited: those that this process opens itself are closed when it
/// executes another program, and no inherited one can be.
pub fn is_inherited(fd: RawFd) -> bool {
    // SAFETY: reads the flags of a number, which is no descriptor or remains what it is.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags != -1 && flags & libc::FD_CLOEXEC == 0
}

/// What an inherited socket is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SocketError {
    /// Not a socket at all.
    #[error("it is no socket")]
    NoSocket,
    /// Of another type.
    #[error("it is of another type of socket")]
    Type,
    /// Of the right type, and leading nowhere.
    #[error("it is not connected")]
    NotConnected,
}

/// Checks that a descriptor is a connected socket of a type, and takes note of nothing.
///
/// # Errors
/// [`SocketError`].
pub fn check_socket(fd: &OwnedFd, kind: socket2::Type) -> Result<(), SocketError> {
    let socket = socket2::SockRef::from(fd);
    match socket.r#type() {
        Err(_) => Err(SocketError::NoSocket),
        Ok(found) if found != kind => Err(SocketError::Type),
        Ok(_) => socket
            .peer_addr()
            .map(drop)
            .map_err(|_| SocketError::NotConnected),
    }
}

/// Returns when the other end of a pipe or socket pair is closed, by whatever end of whoever held it.
/// Bytes that arrive meanwhile mean nothing.
///
/// # Errors
/// The host's error when the descriptor cannot be read.
pub async fn closed(lifeline: OwnedFd) -> io::Result<()> {
    use nix::errno::Errno;

    set_nonblocking(&lifeline)?;
    // SAFETY: an OwnedFd is open and is the same descriptor for as long as it lives, and it lives inside
    // the AsyncFd until that is dropped.
    let lifeline = unsafe { tokio::io::unix::AsyncFd::register(lifeline) }?;
    let mut buffer = [0; 64];
    loop {
        let mut ready = lifeline.readable().await?;
        match nix::unistd::read(lifeline.get_ref(), &mut buffer) {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Makes reads and writes return at once.
///
/// # Errors
/// The host's error.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::OFlag;

    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::IntoRawFd as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_number_that_is_not_open_is_refused() {
        let error = take(1_000_000).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EBADF));
    }

    #[test]
    fn what_is_taken_is_not_inherited_further() {
        let (here, _there) = UnixStream::pair().unwrap();
        let taken = take(here.into_raw_fd()).unwrap();
        let flags = FdFlag::from_bits_retain(fcntl(&taken, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }

    #[test]
    fn what_this_process_opened_itself_was_not_inherited() {
        use std::os::fd::AsRawFd as _;
        let (here, _there) = UnixStream::pair().unwrap();
        assert!(!is_inherited(here.as_raw_fd()));
        fcntl(&here, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        assert!(is_inherited(here.as_raw_fd()));
        assert!(!is_inherited(1_000_000));
    }

    #[test]
    fn a_socket_is_taken_for_what_it_is() {
        use socket2::{Domain, Socket, Type};
        let (stream, _there) = UnixStream::pair().unwrap();
        let stream = OwnedFd::from(stream);
        assert_eq!(check_socket(&stream, Type::STREAM), Ok(()));
        assert_eq!(check_socket(&stream, Type::DGRAM), Err(SocketError::Type));
        let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert_eq!(check_socket(&datagram.into(), Type::DGRAM), Ok(()));
        let alone = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        assert_eq!(
            check_socket(&alone.into(), Type::STREAM),
            Err(SocketError::NotConnected)
        );
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(
            check_socket(&file.into(), Type::STREAM),
            Err(SocketError::NoSocket)
        );
    }

    #[tokio::test]
    async fn the_lifeline_ends_with_its_other_end_and_not_with_bytes() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut closed = tokio::spawn(closed(here.into()));
        there.write_all(b"still here").unwrap();
        let early = tokio::time::timeout(std::time::Duration::from_millis(50), &mut closed).await;
        assert!(early.is_err());
        drop(there);
        closed.await.unwrap().unwrap();
    }
}
