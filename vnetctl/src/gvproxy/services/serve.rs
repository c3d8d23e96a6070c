//! One connection: its limits, its first request, and then HTTP/1.1 by `hyper`.
//!
//! The first request's head is read here, and given to `hyper` with the rest of the stream, unless it is a tunnel's:
//! those have no response, which `hyper` could not be kept from sending.
//!
//! At the limit the connection that has been idle for the longest time makes way for the next (`places`): it is closed,
//! as an idle one may be at any time.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper::header::{HOST, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use super::guest::OneOf;
use super::places::{Busy, Lasting, Place};
use super::{Limits, Origin, Services, route, tunnel};

/// How long a request may take to arrive, and a connection be idle. gvproxy's.
pub(super) const READ_PATIENCE: Duration = Duration::from_secs(10);
/// A request's head, at most.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Headers of a request, at most.
const HEADERS_MAX: usize = 100;

/// What a connection holds that is one too many for another.
enum Permit {
    Socket(Place),
    Guest { _one: OneOf },
}

impl Permit {
    /// Waits until the connection is to make way for another. A guest's never is: whom it keeps out is itself.
    async fn made_way(&self) {
        match self {
            Self::Socket(place) => place.made_way().await,
            Self::Guest { .. } => std::future::pending().await,
        }
    }

    /// A request begins. `Err` where its connection has made way already.
    fn begin(&self) -> Result<Option<Busy>, MadeWay> {
        match self {
            Self::Socket(place) => place.begin().map(Some).ok_or(MadeWay),
            Self::Guest { .. } => Ok(None),
        }
    }
}

/// A connection was idle for the longest time, and is to be closed.
struct MadeWay;

/// Serves one connection.
pub(super) async fn stream<S>(services: &Arc<Services>, mut stream: S, mut read: Vec<u8>, origin: Origin)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Some(permit) = permit(services, &origin) else {
        // Whoever is refused may be told so; nothing waits for it.
        let _ = tokio::time::timeout(READ_PATIENCE, stream.write_all(TOO_MANY)).await;
        return;
    };
    let mut first = None;
    if let Some(limits) = limits(services, &origin) {
        let head = tokio::select! {
            // Whoever has said everything already does not make way.
            biased;
            head = tokio::time::timeout(READ_PATIENCE, read_head(&mut stream, &mut read)) => head,
            () = permit.made_way() => return tell_made_way(),
        };
        match permit.begin() {
            Ok(busy) => first = busy,
            Err(MadeWay) => return tell_made_way(),
        }
        match head {
            Ok(Ok(Some(Tunnel { target, head_bytes }))) if route::may_tunnel(services, &origin).await => {
                drop(first);
                drop(permit);
                let Ok(_permit) = limits.tunnels.try_acquire() else {
                    let _ = tokio::time::timeout(READ_PATIENCE, stream.write_all(TOO_MANY)).await;
                    return;
                };
                let tunnels = services.tunnels.as_ref();
                return tunnel::serve(stream, &read[head_bytes..], target, tunnels).await;
            }
            // Why there is no tunnel is answered as to any request.
            Ok(Ok(_)) => {}
            // It ended, or nothing came.
            Ok(Err(_)) | Err(_) => return,
        }
    }
    let first = Mutex::new(first);
    let service = service_fn(|request| {
        let services = Arc::clone(services);
        let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let begun = first.map_or_else(|| permit.begin(), |busy| Ok(Some(busy)));
        async move {
            let Ok(mut busy) = begun else {
                // It is closed before this is looked at again.
                return std::future::pending().await;
            };
            let answer = route::answer(services, origin, request, busy.as_mut()).await;
            Ok::<_, Infallible>(answer.map(|body| Lasting::new(body, busy)))
        }
    });
    let serving = http().serve_connection(TokioIo::new(Replay { read, at: 0, stream }), service);
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                tracing::debug!(%error, "a connection of the services API ended");
            }
        }
        () = permit.made_way() => tell_made_way(),
    }
}

fn tell_made_way() {
    tracing::debug!(
        "a connection of the services API was idle for the longest time, and made way for another"
    );
}

/// HTTP/1.1 within the limits of this module, and a response for as long as it takes.
pub(super) fn http() -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(READ_PATIENCE)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .half_close(true)
        .title_case_headers(true);
    http
}

fn limits<'a>(services: &'a Services, origin: &Origin) -> Option<&'a Limits> {
    match origin {
        Origin::Services => Some(&services.on_services),
        Origin::Listen => Some(&services.on_listen),
        // Guests have no tunnels.
        Origin::Guest(_) => None,
    }
}

fn permit(services: &Services, origin: &Origin) -> Option<Permit> {
    match origin {
        Origin::Guest(guest) => services
            .of_guests
            .one(guest.address)
            .map(|one| Permit::Guest { _one: one }),
        Origin::Services | Origin::Listen => {
            let limits = limits(services, origin)?;
            limits.connections.enter().map(Permit::Socket)
        }
    }
}

/// A request that is a tunnel's.
struct Tunnel {
    target: SocketAddr,
    head_bytes: usize,
}

/// Reads until the first request's head is there, or is none. Says whether it is a tunnel's that can be served.
async fn read_head<S: AsyncRead + Unpin>(stream: &mut S, read: &mut Vec<u8>) -> io::Result<Option<Tunnel>> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(read) {
            Ok(httparse::Status::Complete(head_bytes)) => return Ok(as_tunnel(&request, head_bytes)),
            Ok(httparse::Status::Partial) if read.len() < HEAD_BYTES_MAX => {}
            // What is wrong with it is `hyper`'s to say.
            Ok(httparse::Status::Partial) | Err(_) => return Ok(None),
        }
        if stream.read_buf(read).await? == 0 {
            return if read.is_empty() {
                Err(io::ErrorKind::UnexpectedEof.into())
            } else {
                Ok(None)
            };
        }
    }
}

/// Those with wrong parameters are answered as any request is, and so is whatever a browser sent.
fn as_tunnel(request: &httparse::Request<'_, '_>, head_bytes: usize) -> Option<Tunnel> {
    let uri: Uri = request.path?.parse().ok()?;
    if uri.path() != route::TUNNEL {
        return None;
    }
    let has = |name: &str| {
        let mut names = request.headers.iter().map(|header| header.name);
        names.any(|given| given.eq_ignore_ascii_case(name))
    };
    let is_of_a_browser = has(ORIGIN.as_str()) || has(route::FETCH_SITE);
    if is_of_a_browser || (request.version == Some(1) && !has(HOST.as_str())) {
        return None;
    }
    let target = tunnel::target(uri.query().unwrap_or_default()).ok()?;
    Some(Tunnel { target, head_bytes })
}

/// A stream of which something has been read.
struct Replay<S> {
    read: Vec<u8>,
    /// How much of that has been read again.
    at: usize,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Replay<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let left = &this.read[this.at..];
        if left.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let count = left.len().min(buf.remaining());
        buf.put_slice(&left[..count]);
        this.at += count;
        if this.at == this.read.len() {
            this.read = Vec::new();
            this.at = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Replay<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n\
Connection: close\r\nContent-Length: 61\r\n\r\ntoo many connections are open here already; close some first\n";
