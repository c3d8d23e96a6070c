//! One message and its descriptor, to and from one datagram (unix(7), `SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::egress::stream::{HostStream, NotAStream};
use crate::front::FrontMessage;

/// The longest message, bytes: the longest head of a request in base64, and room to spare.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Descriptors taken from one datagram at most; what is beyond the system closes. One is meant.
const DESCRIPTORS_MAX: usize = 4;

/// Why a datagram is no message. Whatever descriptors it carried are closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    /// It carries none, or several.
    #[error("a message of the front's channel carries {0} descriptors (expected 1)")]
    Descriptors(usize),
    /// It is longer than any.
    #[error("a message of the front's channel is longer than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// It is not JSON, or not such a message.
    #[error("a message of the front's channel is not understood")]
    Json(#[source] serde_json::Error),
    /// What it carries cannot be used.
    #[error("the descriptor on the front's channel is no connection")]
    NotAStream(#[source] NotAStream),
}

/// A message's bytes.
pub(super) fn encode(message: &FrontMessage) -> Option<Vec<u8>> {
    let bytes = serde_json::to_vec(message).ok()?;
    (bytes.len() <= MESSAGE_BYTES_MAX).then_some(bytes)
}

/// Writes one datagram.
///
/// # Errors
/// The system's; `WouldBlock` where the other side's queue is full.
pub(super) fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[&OwnedFd]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty())?;
    Ok(())
}

/// Reads one datagram.
///
/// # Errors
/// The system's; `WouldBlock` where there is none.
pub(super) fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Result<(FrontMessage, HostStream), Malformed>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(buffer)],
        &mut control,
        RECEIVE_FLAGS,
    )?;
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Ok(Err(Malformed::TooLong));
    }
    Ok(decode(&buffer[..received.bytes], descriptors))
}

fn decode(bytes: &[u8], mut descriptors: Vec<OwnedFd>) -> Result<(FrontMessage, HostStream), Malformed> {
    let count = descriptors.len();
    let Some(descriptor) = descriptors.pop().filter(|_| count == 1) else {
        return Err(Malformed::Descriptors(count));
    };
    let message = serde_json::from_slice(bytes).map_err(Malformed::Json)?;
    close_on_exec(&descriptor);
    let stream = HostStream::from_descriptor(descriptor).map_err(Malformed::NotAStream)?;
    Ok((message, stream))
}

#[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
const RECEIVE_FLAGS: RecvFlags = RecvFlags::CMSG_CLOEXEC;
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
const RECEIVE_FLAGS: RecvFlags = RecvFlags::empty();

/// Where the system does not do so by itself.
fn close_on_exec(descriptor: &OwnedFd) {
    if RECEIVE_FLAGS.is_empty() {
        // Nothing that could fail of a descriptor that is open.
        let _ = rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC);
    }
}
