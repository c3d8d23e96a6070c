//! `/services/forwarder/{all,expose,unexpose}`: forwards, in gvproxy's words. TCP, UDP and Unix sockets are forwards of
//! the dataplane (`ForwardService`); a Unix socket that leads to a guest's over SSH is a listener of this process.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::Arc;

use hyper::StatusCode;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Serialize;
use tonic::Code;
use vnet_proto::model::ForwardListen;
use vnet_proto::v1;

use super::address;
use super::answer::{Answer, UNANSWERED, is_away, listen_of, listen_problem, reason};
use super::control::CallError;
use super::exposed::{Closing, GUEST_FORWARDS_MAX, Row, TakeError, Taken};
use super::guest::Guest;
use super::json::{Json, Object};
use super::remote::{self, UnixRemote};
use super::{Origin, Services};
use crate::client::{asking, unary};
use crate::failure::describe;
use crate::gvproxy::ssh::redacted;

/// What of a path is not written as it is in a URL.
const PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// What can be exposed, in the order of its words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    /// A named pipe of Windows.
    Npipe,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// A Unix stream socket.
    Unix,
}

impl Kind {
    /// Its word in requests and lists.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Npipe => "npipe",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Unix => "unix",
        }
    }

    fn of(word: &str) -> Option<Self> {
        [Self::Npipe, Self::Tcp, Self::Udp, Self::Unix]
            .into_iter()
            .find(|kind| kind.word() == word)
    }

    /// What helps where a place is taken.
    fn elsewhere(self) -> &'static str {
        match self {
            Self::Unix | Self::Npipe => "expose at another path",
            Self::Tcp | Self::Udp => "expose another port",
        }
    }

    fn protocol(self) -> v1::Protocol {
        match self {
            Self::Udp => v1::Protocol::Udp,
            _ => v1::Protocol::Tcp,
        }
    }
}

/// What a client asks to be exposed.
#[derive(Debug)]
struct Request {
    local: String,
    remote: String,
    protocol: String,
}

impl Request {
    fn read(body: &[u8], name: &str) -> Result<Self, String> {
        let value = Json::read(body)?;
        let object = Object::of(&value, name)?;
        let mut protocol = object.text("protocol")?;
        if protocol.is_empty() {
            Kind::Tcp.word().clone_into(&mut protocol);
        }
        Ok(Self {
            local: object.text("local")?,
            remote: object.text("remote")?,
            protocol,
        })
    }
}

#[derive(Serialize)]
struct Listed<'a> {
    local: &'a str,
    remote: String,
    protocol: &'static str,
}

impl Services {
    /// Lists what is exposed; to a guest, what it has exposed itself.
    pub(super) async fn forwarder_all(&self, origin: &Origin) -> Result<Answer, Answer> {
        let guest = origin.guest().map(|guest| guest.address);
        let mark = self.exposed.mark();
        let forwards = self.control.list_forwards().await?;
        self.exposed.forget(mark, &forwards);
        let mut rows = self.exposed.rows(guest);
        if guest.is_none() {
            let own = self.exposed.listens();
            let others = forwards
                .iter()
                .filter(|forward| !own.contains(&(forward.protocol(), forward.listen.clone())));
            rows.extend(others.map(row));
        }
        rows.sort();
        let listed: Vec<Listed<'_>> = rows
            .iter()
            .map(|row| Listed {
                local: &row.local,
                remote: redacted(&row.remote),
                protocol: row.protocol.word(),
            })
            .collect();
        Ok(Answer::json(&listed))
    }

    /// Exposes something.
    pub(super) async fn expose(self: Arc<Self>, origin: Origin, body: Vec<u8>) -> Result<Answer, Answer> {
        let request = Request::read(&body, "ExposeRequest").map_err(Answer::bad_request)?;
        let kind = Kind::of(&request.protocol);
        let guest = origin.guest();
        if guest.is_some() && matches!(kind, Some(Kind::Unix | Kind::Npipe)) {
            return Err(
                Answer::forbidden("a guest can expose tcp and udp, and nothing else")
                    .with_remedy("expose it on the host, at the socket of -services"),
            );
        }
        match kind {
            Some(kind @ (Kind::Unix | Kind::Npipe)) => {
                self.expose_unix(kind, &request, &origin).await?;
                Ok(Answer::done())
            }
            Some(kind) => {
                let caller = guest.map(|guest| guest.address);
                let remote = remote::with_caller(&request.remote, caller)?;
                let only_at = self.expose_port(kind, &request.local, &remote, &origin).await?;
                Ok(Answer::done().with_listen(only_at.unwrap_or_default()))
            }
            None => {
                remote::with_caller(&request.remote, guest.map(|guest| guest.address))?;
                Err(Answer::failed(format!("unknown protocol {}", request.protocol))
                    .with_remedy("tcp, udp and unix are known"))
            }
        }
    }

    /// Ends what is exposed.
    pub(super) async fn unexpose(self: Arc<Self>, origin: Origin, body: Vec<u8>) -> Result<Answer, Answer> {
        let Request { local, protocol, .. } =
            Request::read(&body, "UnexposeRequest").map_err(Answer::bad_request)?;
        let not_found =
            || Answer::failed("proxy not found").with_remedy("GET /services/forwarder/all lists them");
        let kind = Kind::of(&protocol).ok_or_else(not_found)?;
        let guest = origin.guest().map(|guest| guest.address);
        let mut found = true;
        let forwards = match self.exposed.closing(kind, &local, guest) {
            Some(Closing::Ssh) => {
                self.ssh.unexpose(&local);
                self.exposed.closed(kind, &local);
                return Ok(Answer::done());
            }
            Some(Closing::Forwards(forwards)) => forwards,
            None if guest.is_some() => return Err(not_found()),
            None => {
                found = false;
                self.forwards_at(kind, &local).await?
            }
        };
        for (protocol, listen) in forwards {
            found |= self.close(protocol, listen).await?;
        }
        self.exposed.closed(kind, &local);
        if found {
            Ok(Answer::done())
        } else {
            Err(not_found())
        }
    }

    /// Tells of forwards that were opened otherwise in which words they were asked for, as the configuration has
    /// them. They are listed and ended by these.
    pub fn adopt(&self, is_udp: bool, local: &str, remote: &str, listens: &[SocketAddr]) {
        let kind = if is_udp { Kind::Udp } else { Kind::Tcp };
        if let Ok(taken) = self.exposed.take(kind, local, remote, None) {
            let forwards = listens.iter().map(|at| (kind.protocol(), at.to_string()));
            taken.opened(forwards.collect());
        }
    }

    /// Opens ports; gives where, if that is less than was asked for.
    async fn expose_port(
        &self,
        kind: Kind,
        local: &str,
        remote: &str,
        origin: &Origin,
    ) -> Result<Option<String>, Answer> {
        let guest = origin.guest();
        let owner = guest.map(|guest| guest.address);
        let taken = self.take(kind, local, remote, owner).await?;
        let target = remote::address(remote)?;
        let listen = address::listen(kind, local, guest.is_none())
            .await
            .map_err(Answer::failed)?;
        if let Some(guest) = guest.filter(|guest| guest.address != target.ip()) {
            let text = format!(
                "a guest can expose its own address alone, which is {}",
                guest.address
            );
            return Err(Answer::forbidden(text).with_remedy("leave the remote's host out, as :8080"));
        }
        let is_any = listen.is_any_address;
        let opened = match self.open(guest, kind, listen.at, is_any, target).await {
            Ok(opened) => opened,
            Err(error) => return Err(self.refused(origin, kind, local, &listen.shown, error).await),
        };
        let first: Option<SocketAddr> = opened.parse().ok();
        if is_any && first.is_some_and(|at| at.ip().is_loopback()) {
            taken.opened(vec![(kind.protocol(), opened.clone())]);
            return Ok(Some(opened));
        }
        let mut forwards = vec![(kind.protocol(), opened.clone())];
        if let Some(mut also) = listen.also {
            // The port that the first was given, where any would do.
            if let Some(first) = first {
                also.set_port(first.port());
            }
            // Where a policy came meanwhile, half of what it would open is not asked for: it closes the first.
            match self.open(guest, kind, also, false, target).await {
                Ok(opened) => forwards.push((kind.protocol(), opened)),
                Err(error) => {
                    let refused = self.refused(origin, kind, local, &listen.shown, error).await;
                    // Half of it is none.
                    if let Err(error) = self.close(kind.protocol(), opened.clone()).await {
                        let why = Answer::from(error);
                        tracing::warn!(at = opened, "half of what was refused stays open: {}", why.text());
                    }
                    return Err(refused);
                }
            }
        }
        taken.opened(forwards);
        Ok(None)
    }

    /// Opens a port: for a guest if what it is under allows it, which may take as long as a person does.
    async fn open(
        &self,
        guest: Option<&Guest>,
        kind: Kind,
        listen: SocketAddr,
        is_any_address: bool,
        target: SocketAddr,
    ) -> Result<String, CallError> {
        let Some(guest) = guest else {
            return self.create(kind, listen.to_string(), target).await;
        };
        let mut request = v1::RequestForwardRequest {
            vm_id: guest.vm.0,
            any_address: is_any_address,
            ..Default::default()
        };
        request
            .forward
            .replace(self.forward(kind, listen.to_string(), target));
        let answer = self
            .control
            .call(|client| async move { client.forwards().request_forward(asking(request)).await })
            .await?;
        let opened = answer.forward.map(|forward| forward.listen);
        Ok(opened.unwrap_or_else(|| listen.to_string()))
    }

    fn forward(&self, kind: Kind, listen: String, target: SocketAddr) -> v1::Forward {
        v1::Forward {
            network: self.control.network().to_owned(),
            protocol: kind.protocol().into(),
            listen,
            target: target.to_string(),
            ..Default::default()
        }
    }

    async fn expose_unix(&self, kind: Kind, request: &Request, origin: &Origin) -> Result<(), Answer> {
        let Request { local, remote, .. } = request;
        let taken = self.take(kind, local, remote, None).await?;
        let leads = remote::of_unix(remote)?;
        if kind == Kind::Npipe {
            return Err(Answer::failed("named pipes are not supported by this platform"));
        }
        let path = Path::new(local);
        if !path.is_absolute() {
            let text = format!("listen unix {local}: the path is not absolute");
            return Err(
                Answer::bad_request(text).with_remedy("write it from the root on, as /run/user/1000/a.sock")
            );
        }
        // What is no socket is nobody's to remove. A socket that nobody listens at is replaced by who binds it.
        let is_other = std::fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket());
        if is_other {
            return Err(in_use("unix", local).with_remedy(
                "what is there is no socket, and is left as it is; remove it or choose another path",
            ));
        }
        match leads {
            UnixRemote::Ssh => match self.ssh.expose(local, remote).await {
                Ok(()) => {
                    taken.over_ssh();
                    Ok(())
                }
                Err(told) => Err(Answer::lines(StatusCode::INTERNAL_SERVER_ERROR, &told)),
            },
            UnixRemote::Tcp(target) => {
                let listen = format!("unix://{}", utf8_percent_encode(local, PATH));
                match self.create(kind, listen, target).await {
                    Ok(opened) => {
                        taken.opened(vec![(kind.protocol(), opened)]);
                        Ok(())
                    }
                    Err(error) => Err(self.refused(origin, kind, local, local, error).await),
                }
            }
        }
    }

    async fn take(
        &self,
        kind: Kind,
        local: &str,
        remote: &str,
        guest: Option<IpAddr>,
    ) -> Result<Taken, Answer> {
        let mut taken = self.exposed.take(kind, local, remote, guest);
        // What is in the way may be closed since, by a person or by what the guest is under.
        if taken.is_err() {
            let mark = self.exposed.mark();
            if let Ok(forwards) = self.control.list_forwards().await {
                self.exposed.forget(mark, &forwards);
                taken = self.exposed.take(kind, local, remote, guest);
            }
        }
        taken.map_err(|error| match error {
            TakeError::Running => running(kind, local),
            TakeError::GuestLimit => {
                let text = format!("this guest has exposed {GUEST_FORWARDS_MAX} ports, which is the most");
                Answer::error(StatusCode::TOO_MANY_REQUESTS, text).with_remedy("unexpose one first")
            }
            TakeError::Full => {
                Answer::failed("too many are exposed already").with_remedy("unexpose one first")
            }
        })
    }

    /// Closes a forward; `false` where someone else has.
    async fn close(&self, protocol: v1::Protocol, listen: String) -> Result<bool, CallError> {
        let mut request = v1::DeleteForwardRequest {
            protocol: protocol.into(),
            listen,
            ..Default::default()
        };
        self.control.network().clone_into(&mut request.network);
        let deleted = self
            .control
            .call(|client| async move { client.forwards().delete_forward(unary(request)).await })
            .await;
        match deleted {
            Ok(_) => Ok(true),
            Err(CallError::Refused(status)) if status.code() == Code::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens a forward; gives where it listens.
    async fn create(&self, kind: Kind, listen: String, target: SocketAddr) -> Result<String, CallError> {
        let asked = listen.clone();
        let mut request = v1::CreateForwardRequest::default();
        request.forward.replace(self.forward(kind, listen, target));
        let answer = self
            .control
            .call(|client| async move { client.forwards().create_forward(unary(request)).await })
            .await?;
        let opened = answer.forward.map(|forward| forward.listen);
        Ok(opened.filter(|listen| !listen.is_empty()).unwrap_or(asked))
    }

    /// What gvproxy says where a forward is refused. What has a place is no affair of who may be in a VM.
    async fn refused(
        &self,
        origin: &Origin,
        kind: Kind,
        local: &str,
        shown: &str,
        error: CallError,
    ) -> Answer {
        let CallError::Refused(status) = error else {
            return error.into();
        };
        if is_away(&status) {
            return (*status).into();
        }
        let told = describe(&status);
        // What the VM is under does not allow it, nobody answered, or too many wait for that.
        let own = match reason(&status).as_deref() {
            Some("DENIED") => Some(StatusCode::FORBIDDEN),
            Some(UNANSWERED) => Some(StatusCode::GATEWAY_TIMEOUT),
            Some("TOO_MANY_WAIT") => Some(StatusCode::SERVICE_UNAVAILABLE),
            _ => None,
        };
        if let Some(code) = own {
            return Answer::lines(code, &told);
        }
        let network = kind.word();
        let bind = |why: &str| Answer::failed(format!("listen {network} {shown}: bind: {why}"));
        let answer = match status.code() {
            Code::AlreadyExists => {
                let elsewhere = kind.elsewhere();
                match self.in_the_way(origin, kind, &status).await {
                    // It is the same one.
                    Some(other) if other == local => return running(kind, local),
                    Some(other) => {
                        let remedy =
                            format!("{other} is exposed already, and has it: unexpose that, or {elsewhere}");
                        return in_use(network, shown).with_remedy(remedy);
                    }
                    None if *origin != Origin::Services => {
                        return in_use(network, shown).with_remedy(elsewhere);
                    }
                    None => in_use(network, shown),
                }
            }
            _ => match listen_problem(&status).as_deref() {
                Some("NOT_PERMITTED") => bind("permission denied"),
                Some("NO_SUCH_DIRECTORY") => bind("no such file or directory"),
                Some("NO_SUCH_ADDRESS") => bind("cannot assign requested address"),
                _ => Answer::failed(told.lines().next().unwrap_or_default()),
            },
        };
        answer.with_remedy(told.lines().map(str::trim).collect::<Vec<_>>().join("; "))
    }

    /// What has the place that a status speaks of, in the words by which it is listed to who asks.
    async fn in_the_way(&self, origin: &Origin, kind: Kind, status: &tonic::Status) -> Option<String> {
        let taken: ForwardListen = listen_of(status)?.parse().ok()?;
        let guest = origin.guest().map(|guest| guest.address);
        let exposed = self.exposed.in_the_way(kind.protocol(), &taken, guest);
        if exposed.is_some() || guest.is_some() {
            return exposed;
        }
        let forwards = self.control.list_forwards().await.ok()?;
        let other = forwards.iter().find(|forward| {
            let listen = forward.listen.parse::<ForwardListen>();
            forward.protocol() == kind.protocol() && listen.is_ok_and(|listen| listen.overlaps(&taken))
        });
        other.map(|forward| row(forward).local)
    }

    /// The forwards that a place stands for, of those that were not exposed here.
    async fn forwards_at(&self, kind: Kind, local: &str) -> Result<Vec<(v1::Protocol, String)>, Answer> {
        let places: Vec<String> = match kind {
            Kind::Npipe => Vec::new(),
            Kind::Unix => vec![local.to_owned()],
            Kind::Tcp | Kind::Udp => match address::listen(kind, local, true).await {
                Ok(listen) => std::iter::once(listen.at)
                    .chain(listen.also)
                    .map(|at| at.to_string())
                    .collect(),
                Err(_) => Vec::new(),
            },
        };
        let own = self.exposed.listens();
        let forwards = self.control.list_forwards().await?;
        Ok(forwards
            .into_iter()
            .filter(|forward| {
                let row = row(forward);
                row.protocol == kind && places.contains(&row.local)
            })
            .map(|forward| (forward.protocol(), forward.listen))
            // One that was asked for in other words is ended by those.
            .filter(|forward| !own.contains(forward))
            .collect())
    }
}

/// A forward of the dataplane's as it is listed.
fn row(forward: &v1::Forward) -> Row {
    match forward.listen.strip_prefix("unix://") {
        Some(path) => Row {
            local: percent_decode_str(path).decode_utf8_lossy().into_owned(),
            protocol: Kind::Unix,
            remote: format!("tcp://{}", forward.target),
        },
        None => Row {
            local: forward.listen.clone(),
            protocol: match forward.protocol() {
                v1::Protocol::Udp => Kind::Udp,
                _ => Kind::Tcp,
            },
            remote: forward.target.clone(),
        },
    }
}

fn running(kind: Kind, local: &str) -> Answer {
    Answer::failed(format!("proxy already running for {} on {local}", kind.word()))
        .with_remedy(format!("unexpose it first, or {}", kind.elsewhere()))
}

fn in_use(network: &str, shown: &str) -> Answer {
    Answer::failed(format!("listen {network} {shown}: bind: address already in use"))
}
