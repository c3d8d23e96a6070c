//! One client's bytes, both ways, each way with its own end.
//!
//! A client's shutdown is the channel's end of file, and the other way round. What the guest sends is held up to
//! [`HELD_BYTES_MAX`] while the client does not read, so that what the client itself sends goes on; from there on the
//! guest waits, and the client is not heard either, as the connection is read no more.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use russh::client::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{ReadHalf, WriteHalf};

/// How much of what the guest sends waits for the client.
const HELD_BYTES_MAX: usize = 2 * 1024 * 1024;
/// What a message costs beside its data: many have one byte.
const MESSAGE_BYTES: usize = 256;
/// How much of what the client sends is read at once: a packet of SSH.
const READ_BYTES: usize = 32 * 1024;

/// Carries bytes until both sides have ended, or one of them is gone. Whether the channel was closed in order, so that
/// its connection may carry another; `gone` is how long a guest may keep the channel of a client that is no more.
pub(super) async fn relay(mut client: UnixStream, channel: Channel<Msg>, gone: Duration) -> bool {
    let (from_guest, to_guest) = channel.split();
    let (reader, writer) = client.split();
    tokio::select! {
        is_closed = to_client(from_guest, writer) => is_closed,
        () = to_guest_until_gone(reader, to_guest, gone) => false,
    }
}

/// Returns only when the client or the connection is gone. An end of file is passed on, and waited after.
async fn to_guest_until_gone(mut client: ReadHalf<'_>, guest: ChannelWriteHalf<Msg>, gone: Duration) {
    let mut buffer = bytes::BytesMut::with_capacity(READ_BYTES);
    loop {
        buffer.reserve(READ_BYTES);
        match client.read_buf(&mut buffer).await {
            Ok(0) => break,
            Ok(_) => {
                if guest.data_bytes(buffer.split().freeze()).await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
    if guest.eof().await.is_err() {
        return;
    }
    loop {
        // It may have shut down one direction, or have closed its socket; a guest that takes the end of file for the
        // end closes the channel by itself.
        tokio::time::sleep(gone).await;
        if !matches!(client.ready(Interest::WRITABLE).await, Ok(ready) if !ready.is_write_closed()) {
            return;
        }
    }
}

/// Whether the channel was closed in order and everything is written.
async fn to_client(mut guest: ChannelReadHalf, mut client: WriteHalf<'_>) -> bool {
    let mut held = Held::default();
    let mut end = End::None;
    let mut closed = None;
    loop {
        if held.messages.is_empty() {
            if let Some(in_order) = closed {
                return in_order;
            }
            if end == End::Due {
                if client.shutdown().await.is_err() {
                    return false;
                }
                end = End::Done;
            }
        }
        tokio::select! {
            message = guest.wait(), if closed.is_none() && held.bytes < HELD_BYTES_MAX => match message {
                Some(ChannelMsg::Data { data }) if !data.is_empty() => held.push(data),
                Some(ChannelMsg::Eof) if end == End::None => end = End::Due,
                Some(ChannelMsg::Close) => closed = Some(true),
                None => closed = Some(false),
                // Windows, and what no socket says.
                Some(_) => {}
            },
            written = held.write(&mut client), if !held.messages.is_empty() => {
                if written.is_err() {
                    return false;
                }
            }
        }
    }
}

/// Whether the guest has said that nothing follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    None,
    /// It has, and the client will hear it after what is held.
    Due,
    Done,
}

/// What the client has not read.
#[derive(Default)]
struct Held {
    messages: VecDeque<Bytes>,
    bytes: usize,
}

impl Held {
    fn push(&mut self, data: Bytes) {
        self.bytes += data.len() + MESSAGE_BYTES;
        self.messages.push_back(data);
    }

    /// Writes some of it. Nothing is lost where this is dropped half-way.
    async fn write(&mut self, client: &mut WriteHalf<'_>) -> std::io::Result<()> {
        let Some(first) = self.messages.front_mut() else {
            return Ok(());
        };
        let count = client.write(first).await?;
        if count == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        first.advance(count);
        self.bytes -= count;
        if first.is_empty() {
            self.messages.pop_front();
            self.bytes -= MESSAGE_BYTES;
        }
        Ok(())
    }
}
