//! A stream of frames, each behind its length: QEMU's `-netdev stream`, `/connect`, vpnkit, and a guest on
//! standard input and output.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use mio::event::Source as _;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use crate::engine::transmit::{Framing, PREFIX_BYTES, Transmit};
use crate::inherit::set_nonblocking;
use crate::link::{FRAME_BYTES_MAX, Filled, First, LinkError, first_of, is_gone, would_block};

/// What one read takes at most, bytes: hundreds of frames a system call.
const READ_BYTES: usize = 1 << 20;
const BUFFER_BYTES: usize = READ_BYTES + FRAME_BYTES_MAX + PREFIX_BYTES;
/// Who has sent so many bytes of runts shows no address any more.
const RUNTS_BYTES_MAX: usize = 64 << 10;

/// Who speaks on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// QEMU's `-netdev stream`.
    Qemu,
    /// A client of `/connect`, behind its request.
    Connect,
    /// HyperKit, behind its handshake.
    Vpnkit,
    /// Whoever holds the other ends of this process's standard input and output.
    Stdio,
}

impl StreamKind {
    /// How long a frame is, in front of it.
    pub fn framing(self) -> Framing {
        match self {
            Self::Qemu => Framing::Be32,
            Self::Connect | Self::Vpnkit | Self::Stdio => Framing::Le16,
        }
    }

    /// Its word in reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Connect => "connect",
            Self::Vpnkit => "vpnkit",
            Self::Stdio => "stdio",
        }
    }
}

/// A connected stream of any family: Unix, TCP or vsock. It blocks, within the time it is given
/// ([`Self::set_patience`]), until it becomes a link.
#[derive(Debug)]
pub struct StreamSocket(socket2::Socket);

impl StreamSocket {
    /// How long one read and one write may take from now on; `None`: for ever.
    ///
    /// # Errors
    /// The system's; a patience of zero is none.
    pub fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(patience)?;
        self.0.set_write_timeout(patience)
    }

    /// Ends the connection in both directions: who reads from it, or writes to it, is told so at once.
    pub fn end(&self) {
        // One that is gone has ended.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

impl io::Read for &StreamSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buffer)
    }
}

impl io::Write for &StreamSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for StreamSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<socket2::Socket> for StreamSocket {
    fn from(socket: socket2::Socket) -> Self {
        Self(socket)
    }
}

impl From<std::os::unix::net::UnixStream> for StreamSocket {
    fn from(socket: std::os::unix::net::UnixStream) -> Self {
        Self(socket.into())
    }
}

impl From<std::net::TcpStream> for StreamSocket {
    fn from(socket: std::net::TcpStream) -> Self {
        Self(socket.into())
    }
}

impl From<StreamSocket> for OwnedFd {
    fn from(socket: StreamSocket) -> Self {
        socket.0.into()
    }
}

/// The connection to one hypervisor.
pub struct StreamLink {
    kind: StreamKind,
    input: OwnedFd,
    /// Where it is another than the input.
    output: Option<OwnedFd>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The buffer has bytes that nobody took yet, and the next [`Self::fill`] is to say so: they were read before
    /// there was a link, or to look whose it is.
    read_before: bool,
}

impl StreamLink {
    /// Over a connected stream. `read_before` are bytes that came behind a request or handshake and belong
    /// to the frames.
    ///
    /// # Errors
    /// When it cannot be made non-blocking, or more was read before than the link itself would.
    pub fn new(socket: impl Into<StreamSocket>, kind: StreamKind, read_before: &[u8]) -> io::Result<Self> {
        let StreamSocket(socket) = socket.into();
        widen(&socket);
        // Only TCP has it, and any other family says so.
        let _ = socket.set_tcp_nodelay(true);
        Self::over(socket.into(), None, kind, read_before)
    }

    /// Over two descriptors, pipes or sockets: frames come from the one and go to the other.
    ///
    /// # Errors
    /// When they cannot be made non-blocking.
    pub fn pair(input: OwnedFd, output: OwnedFd, kind: StreamKind) -> io::Result<Self> {
        set_nonblocking(&output)?;
        Self::over(input, Some(output), kind, &[])
    }

    fn over(
        input: OwnedFd,
        output: Option<OwnedFd>,
        kind: StreamKind,
        read_before: &[u8],
    ) -> io::Result<Self> {
        set_nonblocking(&input)?;
        let mut buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        buffer
            .get_mut(..read_before.len())
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(read_before);
        Ok(Self {
            kind,
            input,
            output,
            buffer,
            start: 0,
            end: read_before.len(),
            read_before: !read_before.is_empty(),
        })
    }

    pub(super) fn framing(&self) -> Framing {
        self.kind.framing()
    }

    pub(super) fn transport(&self) -> &'static str {
        self.kind.word()
    }

    pub(super) fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        let (input, output) = match &self.output {
            None => (interest, None),
            Some(output) => (Interest::READABLE, Some(output)),
        };
        SourceFd(&self.input.as_raw_fd()).register(registry, token, input)?;
        if let Some(output) = output {
            SourceFd(&output.as_raw_fd()).register(registry, token, Interest::WRITABLE)?;
        }
        Ok(())
    }

    pub(super) fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.input.as_raw_fd()).deregister(registry)?;
        if let Some(output) = &self.output {
            SourceFd(&output.as_raw_fd()).deregister(registry)?;
        }
        Ok(())
    }

    pub(super) fn look(&mut self) -> Result<First, LinkError> {
        loop {
            let first = self.first()?;
            self.read_before = self.start < self.end;
            if first != First::Nobody {
                return Ok(first);
            }
            if self.end - self.start >= RUNTS_BYTES_MAX {
                return Ok(First::Unknown);
            }
            // What is there was seen.
            self.read_before = false;
            let filled = self.fill();
            self.read_before = self.start < self.end;
            if filled? == Filled::Nothing {
                return Ok(First::Nobody);
            }
        }
    }

    fn first(&self) -> Result<First, LinkError> {
        let framing = self.kind.framing();
        let mut read = &self.buffer[self.start..self.end];
        while let Some((length, rest)) = framing.split_length(read) {
            if length > FRAME_BYTES_MAX {
                return Err(LinkError::Oversize(length));
            }
            if let Some(first) = first_of(length, &rest[..length.min(rest.len())]) {
                return Ok(first);
            }
            match rest.get(length..) {
                Some(next) => read = next,
                None => break,
            }
        }
        Ok(First::Nobody)
    }

    pub(super) fn fill(&mut self) -> Result<Filled, LinkError> {
        if std::mem::take(&mut self.read_before) {
            return Ok(Filled::Some);
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < READ_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = &mut self.buffer[self.end..];
        match nix::unistd::read(&self.input, room).map_err(io::Error::from) {
            Ok(0) => Err(LinkError::Closed),
            Ok(length) => {
                self.end += length;
                Ok(Filled::Some)
            }
            Err(error) if would_block(&error) => Ok(Filled::Nothing),
            Err(error) if is_gone(&error) => Err(LinkError::Closed),
            Err(error) => Err(LinkError::Io(error)),
        }
    }

    pub(super) fn next_frame(&mut self) -> Result<Option<&[u8]>, LinkError> {
        let read = &self.buffer[self.start..self.end];
        let framing = self.kind.framing();
        let Some((length, rest)) = framing.split_length(read) else {
            return Ok(None);
        };
        if length > FRAME_BYTES_MAX {
            return Err(LinkError::Oversize(length));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let at = self.start + framing.prefix_bytes();
        self.start = at + length;
        Ok(Some(&self.buffer[at..at + length]))
    }

    pub(super) fn flush(&mut self, queue: &mut Transmit) -> Result<bool, LinkError> {
        let output = self.output.as_ref().unwrap_or(&self.input);
        while !queue.is_empty() {
            match nix::unistd::write(output, queue.bytes()).map_err(io::Error::from) {
                Ok(length) => queue.consume(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Ok(false),
                Err(error) if is_gone(&error) => return Err(LinkError::Closed),
                Err(error) => return Err(LinkError::Io(error)),
            }
        }
        Ok(true)
    }
}

/// Asks for socket buffers that hold a burst. The system may give less; it only costs speed.
pub(super) fn widen(socket: &impl std::os::fd::AsFd) {
    const SEND_BYTES: usize = 1 << 20;
    const RECEIVE_BYTES: usize = 4 << 20;
    let socket = socket2::SockRef::from(socket);
    let _ = socket.set_send_buffer_size(SEND_BYTES);
    let _ = socket.set_recv_buffer_size(RECEIVE_BYTES);
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream as Std;

    use super::*;

    fn pair() -> (Std, StreamLink) {
        link_of(StreamKind::Qemu, &[])
    }

    fn link_of(kind: StreamKind, read_before: &[u8]) -> (Std, StreamLink) {
        let (there, here) = Std::pair().unwrap();
        (there, StreamLink::new(here, kind, read_before).unwrap())
    }

    /// Everything that can be read from a link now, until it would wait.
    fn frames(link: &mut StreamLink) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while link.fill().unwrap() == Filled::Some {
            while let Some(frame) = link.next_frame().unwrap() {
                frames.push(frame.to_vec());
            }
        }
        frames
    }

    #[test]
    fn frames_split_anywhere_come_out_whole() {
        let (mut there, mut link) = pair();
        there.write_all(&[0, 0, 0, 3, b'a', b'b']).unwrap();
        assert_eq!(link.fill().unwrap(), Filled::Some);
        assert_eq!(link.next_frame().unwrap(), None);
        there.write_all(&[b'c', 0, 0, 0, 0, 0, 0, 0, 1, b'd']).unwrap();
        link.fill().unwrap();
        assert_eq!(link.next_frame().unwrap().unwrap(), b"abc");
        assert_eq!(link.next_frame().unwrap().unwrap(), b"");
        assert_eq!(link.next_frame().unwrap().unwrap(), b"d");
        assert_eq!(link.next_frame().unwrap(), None);
        assert_eq!(link.fill().unwrap(), Filled::Nothing);
        drop(there);
        assert!(matches!(link.fill(), Err(LinkError::Closed)));
    }

    #[test]
    fn an_absurd_length_ends_the_link() {
        let (mut there, mut link) = pair();
        there.write_all(&[0xff; 8]).unwrap();
        link.fill().unwrap();
        assert!(matches!(link.next_frame(), Err(LinkError::Oversize(0xffff_ffff))));
    }

    #[test]
    fn short_lengths_are_read_split_anywhere_and_runts_come_out_too() {
        let (mut there, mut link) = link_of(StreamKind::Vpnkit, &[]);
        let long = [9; 0xffff];
        let mut bytes = vec![3, 0, b'a', b'b', b'c', 0, 0, 1, 0, b'd', 0xff, 0xff];
        bytes.extend(long);
        let (first, second) = bytes.split_at(1);
        there.write_all(first).unwrap();
        assert_eq!(frames(&mut link), Vec::<Vec<u8>>::new());
        there.write_all(second).unwrap();
        assert_eq!(
            frames(&mut link),
            [b"abc".to_vec(), Vec::new(), b"d".to_vec(), long.to_vec()]
        );
    }

    #[test]
    fn what_was_read_with_the_request_comes_first() {
        let (mut there, mut link) = link_of(StreamKind::Connect, &[1, 0, b'a', 2, 0, b'b']);
        there.write_all(&[b'c', 1, 0, b'd']).unwrap();
        assert_eq!(frames(&mut link), [b"a".to_vec(), b"bc".to_vec(), b"d".to_vec()]);
        assert!(StreamLink::new(there, StreamKind::Connect, &[0; BUFFER_BYTES + 1]).is_err());
    }

    #[test]
    fn many_frames_leave_in_one_write_of_either_framing() {
        for (kind, expected) in [
            (StreamKind::Qemu, &b"\0\0\0\x02ab\0\0\0\x01c"[..]),
            (StreamKind::Stdio, &b"\x02\0ab\x01\0c"[..]),
        ] {
            let (mut there, mut link) = link_of(kind, &[]);
            let mut queue = Transmit::new(crate::mac::Mac::BROADCAST);
            queue.set_framing(link.framing());
            assert!(queue.frame(b"ab") && queue.frame(b"c"));
            assert!(link.flush(&mut queue).unwrap());
            let mut read = [0; 64];
            let length = std::io::Read::read(&mut there, &mut read).unwrap();
            assert_eq!(&read[..length], expected, "{kind:?}");
        }
    }

    #[test]
    fn frames_come_from_one_pipe_and_go_to_another() {
        let ((input, mut there), (mut back, output)) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
        let mut link = StreamLink::pair(input.into(), output.into(), StreamKind::Stdio).unwrap();
        there.write_all(&[2, 0, b'u', b'p']).unwrap();
        assert_eq!(frames(&mut link), [b"up".to_vec()]);
        let mut queue = Transmit::new(crate::mac::Mac::BROADCAST);
        queue.set_framing(link.framing());
        assert!(queue.frame(b"down") && link.flush(&mut queue).unwrap());
        let mut read = [0; 6];
        std::io::Read::read_exact(&mut back, &mut read).unwrap();
        assert_eq!(&read, b"\x04\0down");
        drop(there);
        assert!(matches!(link.fill(), Err(LinkError::Closed)));
        drop(back);
        assert!(queue.frame(b"nobody reads"));
        assert!(matches!(link.flush(&mut queue), Err(LinkError::Closed)));
    }
}
