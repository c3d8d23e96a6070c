//! A TAP device or a packet socket: one frame a read, one frame a write. For `run`'s namespaces.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use mio::event::Source as _;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::link::{Filled, LinkError, would_block};

/// Room for one frame at the largest MTU, with room to see that one is too long.
const BUFFER_BYTES: usize = 65_536 + 64;

/// A descriptor that carries whole frames.
pub struct PacketLink {
    descriptor: OwnedFd,
    buffer: Box<[u8]>,
    length: usize,
}

impl PacketLink {
    /// Over a TAP or packet socket, made non-blocking by whoever opened it.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self {
            descriptor,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            length: 0,
        }
    }

    pub(super) fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        SourceFd(&self.descriptor.as_raw_fd()).register(registry, token, interest)
    }

    pub(super) fn fill(&mut self) -> Result<Filled, LinkError> {
        match nix::unistd::read(&self.descriptor, &mut self.buffer).map_err(io::Error::from) {
            Ok(0) => Err(LinkError::Closed),
            Ok(length) => {
                self.length = length;
                Ok(Filled::Some)
            }
            Err(error) if would_block(&error) => Ok(Filled::Nothing),
            // The namespace is going away, or the interface is down for now.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENETDOWN) => Ok(Filled::Nothing),
            Err(error) => Err(LinkError::Io(error)),
        }
    }

    pub(super) fn next_frame(&mut self) -> Option<&[u8]> {
        let length = std::mem::take(&mut self.length);
        (length != 0).then(|| &self.buffer[..length])
    }

    pub(super) fn flush(&mut self, queue: &mut Transmit) -> Result<bool, LinkError> {
        while let Some(frame) = queue.first_frame() {
            let length = frame.len();
            match nix::unistd::write(&self.descriptor, frame).map_err(io::Error::from) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if would_block(&error) => return Ok(false),
                // A full queue or an interface that is down loses the frame, as a cable would.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(nix::libc::ENOBUFS | nix::libc::EIO | nix::libc::ENETDOWN | nix::libc::EMSGSIZE)
                    ) => {}
                Err(error) => return Err(LinkError::Io(error)),
            }
            queue.consume(PREFIX_BYTES + length);
        }
        Ok(true)
    }
}
