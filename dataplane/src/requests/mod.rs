//! The socket of `--listen`: HTTP requests, of which two are the dataplane's own.
//!
//! | path | what becomes of the connection |
//! |---|---|
//! | `/connect` | a guest's link: frames with short lengths follow, both ways, and no answer is written |
//! | `/tunnel?ip=&port=` | a pipe to that place in the network, behind the two bytes `OK`; 403 where a guest is under a policy or a mode |
//! | any other | the front's, with what was read of it; 404 where there is no front |
//!
//! As in gvproxy (pkg/virtualnetwork/mux.go), but that bytes which arrive with a request are kept. A request's head
//! is all that is read here, in a task of its own: at most [`HEAD_BYTES_MAX`] bytes, within [`HEAD_PATIENCE`]. Of
//! [`HEADS_MAX`] that are being read the one that has waited longest makes way for the next. So whoever connects
//! and says nothing, or little, keeps nobody else from being served.

mod answer;
mod head;
mod heads;
#[cfg(test)]
mod tests;
mod tunnel;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::descriptors::Descriptors;
use crate::egress::stream::{AsyncStream, HostStream};
use crate::front::{Asker, FrontMessage, FrontSender, Tunnels};
use crate::link::listen::{Cid, StreamListener};
use crate::link::stream::{StreamKind, StreamLink, StreamSocket};
use crate::link::{Link, serve};
use crate::metrics::{LinkRefusal, Metrics, RequestRefusal};

use answer::Answer;
use head::Request;
use heads::{Heads, Place};

pub use tunnel::tunnel_target;

/// The longest head of a request, bytes.
pub const HEAD_BYTES_MAX: usize = 32 << 10;
/// How long it may take to arrive.
pub const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// Heads that are read at once, where there are descriptors for as many.
pub const HEADS_MAX: usize = 128;
/// Those of all sockets may have this part of the descriptors that are kept back, and those that are being
/// answered as many.
const HEADS_PART: usize = 8;
/// Bytes of one read.
const READ_BYTES: usize = 4 << 10;
/// How long an answer may take to leave, and what is still sent to be passed over.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
/// Bytes that are passed over at most.
const PASSED_OVER_MAX: usize = 64 << 10;
/// How long accepting pauses when the host has no descriptor left.
const REST: Duration = Duration::from_millis(100);

/// Where those who ask for `/connect` become guests.
pub trait Entrance: Send + Sync {
    /// Lets one in, of this VM where it is known, or counts why not and closes the stream. `early` was read from it
    /// already.
    fn attach(&self, stream: HostStream, from: Option<Cid>, early: &[u8]);
}

impl Entrance for Arc<serve::Entrance> {
    fn attach(&self, stream: HostStream, from: Option<Cid>, early: &[u8]) {
        if self.foresee().is_none() {
            return;
        }
        let socket = StreamSocket::from(socket2::Socket::from(OwnedFd::from(stream)));
        match StreamLink::new(socket, StreamKind::Connect, early) {
            Ok(link) => self.come_in(Link::Stream(link), from),
            Err(error) => self.refuse(LinkRefusal::System, &error),
        }
    }
}

/// What a `--listen` socket serves with. Clones share the limits.
#[derive(Clone)]
pub struct Requests(Arc<Shared>);

struct Shared {
    listen: String,
    entrance: Box<dyn Entrance>,
    tunnels: Tunnels,
    front: Option<FrontSender>,
    heads: Arc<Heads>,
    head_patience: Duration,
    metrics: Arc<Metrics>,
    runtime: tokio::runtime::Handle,
}

impl Requests {
    /// For the socket that `listen` names, as it is to be called to the front; one of so many sockets that share
    /// what there is of descriptors.
    pub fn new(
        listen: String,
        entrance: Box<dyn Entrance>,
        tunnels: Tunnels,
        front: Option<FrontSender>,
        descriptors: &Descriptors,
        sockets: usize,
        metrics: Arc<Metrics>,
    ) -> Self {
        let most = HEADS_MAX.min(descriptors.reserve() / HEADS_PART / sockets.max(1));
        Self(Arc::new(Shared {
            listen,
            entrance,
            tunnels,
            front,
            heads: Heads::new(most),
            head_patience: HEAD_PATIENCE,
            metrics,
            runtime: tokio::runtime::Handle::current(),
        }))
    }

    /// Serves whoever connects, in a thread of its own that ends with the process.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn serve(self, listener: StreamListener) -> io::Result<()> {
        thread::Builder::new().name("accept".to_owned()).spawn(move || {
            loop {
                match listener.accept_from() {
                    Ok((socket, from)) => self.begin(HostStream::accepted(socket.into()), from),
                    Err(error) => {
                        self.0.refused(RequestRefusal::Accept);
                        tracing::debug!(%error, "a connection cannot be accepted");
                        thread::sleep(REST);
                    }
                }
            }
        })?;
        Ok(())
    }

    /// Serves one connection; at once.
    fn begin(&self, stream: HostStream, from: Option<Cid>) {
        self.0.metrics.requests.increment();
        let Some(place) = self.0.heads.enter() else {
            // Those that were asked to make way have not got to it yet.
            self.0.refused(RequestRefusal::Crowded);
            return;
        };
        let shared = Arc::clone(&self.0);
        self.0.runtime.spawn(async move {
            match AsyncStream::new(stream) {
                Ok(stream) => shared.serve(stream, from, place).await,
                Err(error) => {
                    shared.refused(RequestRefusal::Accept);
                    tracing::debug!(%error, "a connection cannot be followed");
                }
            }
        });
    }
}

impl Shared {
    fn refused(&self, cause: RequestRefusal) {
        self.metrics.request_refusals.of(cause).increment();
    }

    async fn serve(self: Arc<Self>, mut stream: AsyncStream, from: Option<Cid>, mut place: Place) {
        let mut read = Vec::new();
        let result = tokio::select! {
            // Whoever has said everything already is not asked to make way.
            biased;
            result = read_head(&mut stream, &mut read) => result,
            () = tokio::time::sleep(self.head_patience) => Err(Some(Answer::TOO_SLOW)),
            () = place.made_way() => Err(Some(Answer::CROWDED)),
        };
        let (request, length) = match result {
            Ok(found) => found,
            // It was closed before it had said anything, as by whoever only looks whether somebody is there.
            Err(None) => return,
            Err(Some(answer)) => return self.refuse(stream, place, &answer).await,
        };
        match request {
            Request::Connect => {
                if let Some(stream) = self.take_out(stream) {
                    self.entrance.attach(stream, from, &read[length..]);
                }
            }
            // Whoever asks may be a guest, of this network or of another, and would reach what it may not.
            Request::Tunnel(_) if !self.tunnels.may_pass() => {
                return self.refuse(stream, place, &Answer::POLICY).await;
            }
            Request::Tunnel(target) => {
                // It is said before there is a way, as the peer does; a way that fails is an end.
                let said = tokio::time::timeout(ANSWER_PATIENCE, stream.write_all(b"OK")).await;
                if !matches!(said, Ok(Ok(()))) {
                    return;
                }
                if let Some(stream) = self.take_out(stream) {
                    read.drain(..length);
                    self.tunnels.open(stream, read, target, Asker::Anybody);
                }
            }
            Request::Other { is_head } => {
                let Some(front) = &self.front else {
                    let answer = Answer {
                        has_body: !is_head,
                        ..Answer::NOT_FOUND
                    };
                    return self.refuse(stream, place, &answer).await;
                };
                let message = FrontMessage::Services {
                    listen: self.listen.clone(),
                    read,
                };
                if let Some(stream) = self.take_out(stream)
                    && let Err(error) = front.send(&message, stream)
                {
                    self.refused(RequestRefusal::Front);
                    tracing::debug!(%error, "a request is not handed over");
                }
            }
        }
    }

    fn take_out(&self, stream: AsyncStream) -> Option<HostStream> {
        match stream.into_host() {
            Ok(stream) => Some(stream),
            Err(error) => {
                self.refused(RequestRefusal::Accept);
                tracing::debug!(%error, "a connection cannot be handed on");
                None
            }
        }
    }

    /// Says why not, and closes.
    async fn refuse(&self, mut stream: AsyncStream, place: Place, answer: &Answer) {
        self.refused(answer.cause);
        // From here on it keeps nobody waiting.
        let made_way = place.leave();
        let answered = async {
            stream.write_all(&answer.bytes()).await?;
            stream.shutdown().await?;
            if made_way {
                return Ok(());
            }
            // A close with something unread would be a reset, and might overtake the answer.
            let mut rest = [0; READ_BYTES];
            let mut passed_over = 0;
            while passed_over < PASSED_OVER_MAX {
                match stream.read(&mut rest).await? {
                    0 => break,
                    length => passed_over += length,
                }
            }
            io::Result::Ok(())
        };
        // Whoever does not take it is closed without.
        let _ = tokio::time::timeout(ANSWER_PATIENCE, answered).await;
    }
}

/// Reads up to the end of a request's head, and perhaps beyond; what is asked for, and the head's length.
async fn read_head(stream: &mut AsyncStream, read: &mut Vec<u8>) -> Result<(Request, usize), Option<Answer>> {
    let mut search = head::Search::default();
    loop {
        if read.len() >= HEAD_BYTES_MAX {
            return Err(Some(Answer::TOO_LONG));
        }
        let before = read.len();
        let room = READ_BYTES.min(HEAD_BYTES_MAX - before);
        read.resize(before + room, 0);
        let result = stream.read(&mut read[before..]).await;
        read.truncate(before + result.as_ref().copied().unwrap_or(0));
        match result {
            Ok(0) if before == 0 => return Err(None),
            Ok(0) => return Err(Some(Answer::BROKEN_OFF)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Err(None),
        }
        if let Some(found) = search.look(read).map_err(Some)? {
            return Ok(found);
        }
    }
}
