//! Which path is which, who may ask for it, and how its request is read.

use std::sync::Arc;

use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{HOST, HeaderMap, HeaderValue, ORIGIN};
use hyper::{Method, Request, Response, StatusCode, Uri, Version};

use super::answer::{Answer, Body};
use super::events::LAST_EVENT_ID;
use super::places::Busy;
use super::serve::READ_PATIENCE;
use super::{Origin, Services, tunnel};

/// A request's body, at most.
pub(super) const BODY_BYTES_MAX: usize = 1 << 20;
/// Where a page stands that had a browser ask (Fetch Metadata Request Headers, section 2.3). Browsers send it with each
/// request to this host, `Origin` only with some.
pub(super) const FETCH_SITE: &str = "sec-fetch-site";
/// The path of tunnels.
pub(super) const TUNNEL: &str = "/tunnel";

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    ForwarderAll,
    Expose,
    Unexpose,
    Zones,
    AddZone,
    RemoveZone,
    RemoveRecord,
    Leases,
    Cam,
    Stats,
    Tunnel,
    NetworkPending,
    NetworkApproved,
    NetworkConnections,
    NetworkAllow,
    NetworkDeny,
    NetworkEvents,
    DnsPending,
    DnsDenied,
    DnsAllowed,
    DnsAllow,
}

/// What paths have in common as to who may ask for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    /// Ports of the host.
    Forwarder,
    /// Names that guests look up.
    Zones,
    /// What there is.
    Inventory,
    /// Streams into the network.
    Tunnel,
    /// What people are asked, and answer.
    Approval,
}

impl Path {
    fn of(path: &str) -> Option<Self> {
        Some(match path {
            "/services/forwarder/all" => Self::ForwarderAll,
            "/services/forwarder/expose" => Self::Expose,
            "/services/forwarder/unexpose" => Self::Unexpose,
            "/services/dns/all" => Self::Zones,
            "/services/dns/add" => Self::AddZone,
            "/services/dns/remove" => Self::RemoveZone,
            "/services/dns/remove/record" => Self::RemoveRecord,
            "/services/dhcp/leases" | "/leases" => Self::Leases,
            "/cam" => Self::Cam,
            "/stats" => Self::Stats,
            TUNNEL => Self::Tunnel,
            // The draft's description has these at the top, its code below /services.
            _ => match path.strip_prefix("/services").unwrap_or(path) {
                "/network/pending" => Self::NetworkPending,
                "/network/approved" => Self::NetworkApproved,
                "/network/connections" => Self::NetworkConnections,
                "/network/allow" => Self::NetworkAllow,
                "/network/deny" => Self::NetworkDeny,
                "/network/events" => Self::NetworkEvents,
                "/dns/pending" => Self::DnsPending,
                "/dns/denied" => Self::DnsDenied,
                "/dns/allowed" => Self::DnsAllowed,
                "/dns/allow" => Self::DnsAllow,
                _ => return None,
            },
        })
    }

    fn family(self) -> Family {
        match self {
            Self::ForwarderAll | Self::Expose | Self::Unexpose => Family::Forwarder,
            Self::Zones | Self::AddZone | Self::RemoveZone | Self::RemoveRecord => Family::Zones,
            Self::Leases | Self::Cam | Self::Stats => Family::Inventory,
            Self::Tunnel => Family::Tunnel,
            Self::NetworkPending
            | Self::NetworkApproved
            | Self::NetworkConnections
            | Self::NetworkAllow
            | Self::NetworkDeny
            | Self::NetworkEvents
            | Self::DnsPending
            | Self::DnsDenied
            | Self::DnsAllowed
            | Self::DnsAllow => Family::Approval,
        }
    }

    /// Whether it changes something, and so must be posted. The others take any method.
    fn is_post(self) -> bool {
        matches!(
            self,
            Self::Expose
                | Self::Unexpose
                | Self::AddZone
                | Self::RemoveZone
                | Self::RemoveRecord
                | Self::NetworkAllow
                | Self::NetworkDeny
                | Self::DnsAllow
        )
    }
}

/// Answers a request, which keeps its connection `busy` where it is one of many.
pub(super) async fn answer(
    services: Arc<Services>,
    origin: Origin,
    request: Request<Incoming>,
    busy: Option<&mut Busy>,
) -> Response<Body> {
    let answer = match handle(services, origin, request, busy).await {
        Ok(answer) | Err(answer) => answer,
    };
    answer.into_response()
}

async fn handle(
    services: Arc<Services>,
    origin: Origin,
    request: Request<Incoming>,
    busy: Option<&mut Busy>,
) -> Result<Answer, Answer> {
    if request.version() == Version::HTTP_11 && !request.headers().contains_key(HOST) {
        return Err(Answer::bad_request(
            "400 Bad Request: missing required Host header",
        ));
    }
    let path = Path::of(request.uri().path()).ok_or_else(Answer::no_path)?;
    may_ask(&services, &origin, path, request.headers()).await?;
    if !path.is_post() {
        return look(&services, &origin, path, &request).await;
    }
    if request.method() != Method::POST {
        return Err(Answer::bad_request("post only"));
    }
    let body = read_body(request.into_body());
    let body = match busy {
        Some(busy) => busy.while_idle(body).await?,
        None => body.await?,
    };
    // What is begun is finished: half of a change is worse than one that its client did not wait for.
    let change = tokio::spawn(async move { change(services, origin, path, body).await });
    change
        .await
        .unwrap_or_else(|_| Err(Answer::failed("the request could not be finished")))
}

/// Refuses what this origin may not ask for.
async fn may_ask(
    services: &Services,
    origin: &Origin,
    path: Path,
    headers: &HeaderMap,
) -> Result<(), Answer> {
    let family = path.family();
    match origin {
        Origin::Guest(_) if family == Family::Forwarder => return services.admit(headers),
        Origin::Guest(_) => return Err(Answer::no_path()),
        Origin::Services | Origin::Listen => from_no_site(headers)?,
    }
    if *origin == Origin::Services {
        return Ok(());
    }
    let elsewhere =
        |text| Err(Answer::forbidden(text).with_remedy("add -services URL, and ask at that socket"));
    match family {
        Family::Approval => elsewhere("not on a socket that a VM can reach: use the one of -services"),
        Family::Forwarder | Family::Zones | Family::Tunnel if services.is_policy_in_force().await? => {
            elsewhere(
                "a policy or mode is in force, so not on a socket that a VM can reach: use the one of -services",
            )
        }
        Family::Forwarder | Family::Zones | Family::Inventory | Family::Tunnel => Ok(()),
    }
}

/// Whether tunnels are opened for who comes from here: a VM's would pass by what is in force. Where that cannot be
/// known, none is.
pub(super) async fn may_tunnel(services: &Services, origin: &Origin) -> bool {
    *origin == Origin::Services || matches!(services.is_policy_in_force().await, Ok(false))
}

/// Refuses what a page from somewhere sends through the user's browser, to a port of this host. What is from a page of
/// this host has its own address for its origin; a name may be anybody's (DNS rebinding).
fn from_no_site(headers: &HeaderMap) -> Result<(), Answer> {
    let is_from_elsewhere = headers
        .get(FETCH_SITE)
        .is_some_and(|site| site != "same-origin" && site != "none");
    let Some(origin) = headers.get(ORIGIN) else {
        return if is_from_elsewhere { Err(foreign()) } else { Ok(()) };
    };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    if !is_from_elsewhere && is_own_page(origin, host).unwrap_or(false) {
        return Ok(());
    }
    Err(foreign())
}

fn foreign() -> Answer {
    Answer::forbidden("a page of another origin may not ask here")
        .with_remedy("serve the page at the same address, 127.0.0.1 or localhost")
}

fn is_own_page(origin: &HeaderValue, host: Option<&str>) -> Option<bool> {
    let origin: Uri = origin.to_str().ok()?.parse().ok()?;
    let authority = origin.authority()?;
    let name = authority.host();
    let is_local = name == "localhost"
        || name
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    Some(is_local && host == Some(authority.as_str()))
}

/// Answers what changes nothing.
async fn look(
    services: &Arc<Services>,
    origin: &Origin,
    path: Path,
    request: &Request<Incoming>,
) -> Result<Answer, Answer> {
    match path {
        Path::ForwarderAll => services.forwarder_all(origin).await,
        Path::Zones => services.list_zones().await,
        Path::Leases => services.leases().await,
        Path::Cam => services.cam().await,
        Path::Stats => services.stats().await,
        Path::Tunnel => {
            tunnel::target(request.uri().query().unwrap_or_default())?;
            Err(Answer::bad_request(
                "/tunnel is served as the first request of a connection alone",
            ))
        }
        Path::NetworkPending => services.network_pending().await,
        Path::NetworkApproved => services.network_approved().await,
        Path::NetworkConnections => services.network_connections().await,
        Path::NetworkEvents => services.events(request.headers().get(LAST_EVENT_ID)).await,
        Path::DnsPending => services.dns_pending().await,
        Path::DnsDenied => services.dns_denied().await,
        Path::DnsAllowed => services.dns_allowed().await,
        _ => Err(Answer::no_path()),
    }
}

/// Does what changes something.
async fn change(
    services: Arc<Services>,
    origin: Origin,
    path: Path,
    body: Vec<u8>,
) -> Result<Answer, Answer> {
    match path {
        Path::Expose => services.expose(origin, body).await,
        Path::Unexpose => services.unexpose(origin, body).await,
        Path::AddZone => services.add_zone(&body).await,
        Path::RemoveZone => services.remove_zone(&body).await,
        Path::RemoveRecord => services.remove_record(&body).await,
        Path::NetworkAllow => services.answer_network(&body, true).await,
        Path::NetworkDeny => services.answer_network(&body, false).await,
        Path::DnsAllow => services.allow_name(&body).await,
        _ => Err(Answer::no_path()),
    }
}

async fn read_body(body: Incoming) -> Result<Vec<u8>, Answer> {
    let too_long = || {
        let text = format!("the body is longer than {BODY_BYTES_MAX} bytes");
        Answer::error(StatusCode::PAYLOAD_TOO_LARGE, text)
    };
    // What says its length is not waited for.
    if body.size_hint().lower() > BODY_BYTES_MAX as u64 {
        return Err(too_long());
    }
    let whole = Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(READ_PATIENCE, whole).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes().into()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_long()),
        Ok(Err(_)) => Err(Answer::bad_request("unexpected EOF")),
        Err(_) => Err(Answer::error(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not arrive within {} s", READ_PATIENCE.as_secs()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_this_host_at_its_own_address_may_ask() {
        let may = |origin: Option<&str>, host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(ORIGIN, origin.parse().unwrap());
            }
            from_no_site(&headers).is_ok()
        };
        assert!(may(None, "gvproxy"), "no browser");
        assert!(may(Some("http://127.0.0.1:8080"), "127.0.0.1:8080"));
        assert!(may(Some("http://localhost:5173"), "localhost:5173"));
        assert!(may(Some("http://[::1]:1"), "[::1]:1"));
        for (origin, host) in [
            ("https://attacker.example", "127.0.0.1:8080"),
            ("http://rebound.example:8080", "rebound.example:8080"),
            ("http://127.0.0.1:9", "127.0.0.1:8080"),
            ("http://192.0.2.1:8080", "192.0.2.1:8080"),
            ("null", "127.0.0.1:8080"),
            ("", ""),
        ] {
            assert!(!may(Some(origin), host), "{origin}");
        }
    }
}
