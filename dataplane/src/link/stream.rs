//! A stream of frames behind 4-byte big-endian lengths: QEMU's `-netdev stream`.

use std::io::{self, Read as _, Write as _};

use mio::event::Source as _;
use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};

use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::link::{FRAME_BYTES_MAX, Filled, LinkError, would_block};

/// What one read takes at most, bytes: hundreds of frames a system call.
const READ_BYTES: usize = 1 << 20;
const BUFFER_BYTES: usize = READ_BYTES + FRAME_BYTES_MAX + PREFIX_BYTES;

/// The connection to one hypervisor.
pub struct StreamLink {
    socket: Socket,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl StreamLink {
    /// Over a connected Unix stream.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn unix(socket: std::os::unix::net::UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        widen(&socket);
        Ok(Self::new(Socket::Unix(UnixStream::from_std(socket))))
    }

    /// Over a connected TCP stream.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn tcp(socket: std::net::TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Self::new(Socket::Tcp(TcpStream::from_std(socket))))
    }

    fn new(socket: Socket) -> Self {
        Self {
            socket,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    pub(super) fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        match &mut self.socket {
            Socket::Unix(socket) => socket.register(registry, token, interest),
            Socket::Tcp(socket) => socket.register(registry, token, interest),
        }
    }

    pub(super) fn fill(&mut self) -> Result<Filled, LinkError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < READ_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = &mut self.buffer[self.end..];
        let read = match &mut self.socket {
            Socket::Unix(socket) => socket.read(room),
            Socket::Tcp(socket) => socket.read(room),
        };
        match read {
            Ok(0) => Err(LinkError::Closed),
            Ok(length) => {
                self.end += length;
                Ok(Filled::Some)
            }
            Err(error) if would_block(&error) => Ok(Filled::Nothing),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(LinkError::Closed),
            Err(error) => Err(LinkError::Io(error)),
        }
    }

    pub(super) fn next_frame(&mut self) -> Result<Option<&[u8]>, LinkError> {
        let read = &self.buffer[self.start..self.end];
        let Some((prefix, rest)) = read.split_first_chunk::<PREFIX_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(LinkError::Oversize(length));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let at = self.start + PREFIX_BYTES;
        self.start = at + length;
        Ok(Some(&self.buffer[at..at + length]))
    }

    pub(super) fn flush(&mut self, queue: &mut Transmit) -> Result<bool, LinkError> {
        while !queue.is_empty() {
            let written = match &mut self.socket {
                Socket::Unix(socket) => socket.write(queue.bytes()),
                Socket::Tcp(socket) => socket.write(queue.bytes()),
            };
            match written {
                Ok(length) => queue.consume(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Ok(false),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    return Err(LinkError::Closed);
                }
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
        let (there, here) = Std::pair().unwrap();
        (there, StreamLink::unix(here).unwrap())
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
}
