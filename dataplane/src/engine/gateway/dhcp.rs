//! DHCP towards guests (RFC 2131, RFC 2132): one message in, at most one answer out.
//!
//! Owns the protocol; which address is whose is [`crate::leases`]'s. The guest meets the only server of
//! its network: it offers at once, acknowledges what the pool grants, and refuses with NAK what it does
//! not, also to a client that it has never seen (it is authoritative). A client is known by the MAC
//! address of its link alone; a message that names another is ignored.
//!
//! Sent: subnet mask, router, DNS servers, domain name, MTU, broadcast address, lease time, server, T1
//! and T2, search list (RFC 3397); the client identifier (RFC 6842) and relay information (RFC 3046) are
//! sent back as they came.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;
use vnet_proto::model::{Name, VmId};

use crate::engine::Time;
use crate::leases::Leases;
use crate::mac::Mac;

/// What is told to every client of a network.
#[derive(Debug, Clone)]
pub struct DhcpConfig {
    /// Router and DHCP server.
    pub gateway: Ipv4Addr,
    /// The guests' subnet.
    pub subnet: Ipv4Net,
    /// DNS servers, usually the gateway alone.
    pub dns: Vec<Ipv4Addr>,
    /// Largest IP packet, bytes.
    pub mtu_bytes: u16,
    /// Domains that a resolver tries for short names, in order. The first is also the domain name.
    pub search_domains: Vec<Name>,
    /// How long a lease holds; the same as the pool's.
    pub lease_time: Duration,
}

/// What a message led to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DhcpOutcome {
    /// The answer.
    pub reply: Option<DhcpReply>,
    /// An address that is the guest's from now on.
    pub bound: Option<Ipv4Addr>,
    /// An address that is the guest's no more.
    pub released: Option<Ipv4Addr>,
    /// The host name that the client gives itself, with anything but visible ASCII made `?`.
    pub claimed_hostname: Option<String>,
    /// Why nothing was done.
    pub ignored: Option<DhcpIgnored>,
}

/// An answer, from the server's port to the client's.
#[derive(Debug, PartialEq, Eq)]
pub struct DhcpReply {
    /// The DHCP message.
    pub payload: Vec<u8>,
    /// Where to; may be the broadcast address.
    pub to: Ipv4Addr,
    /// Where to on the link.
    pub to_mac: Mac,
}

/// Why a message was not answered and changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DhcpIgnored {
    /// Not a DHCP request over Ethernet.
    Malformed,
    /// It names another MAC address than its link's, or came through a relay.
    ForeignClient,
    /// Meant for another server.
    OtherServer,
    /// A kind of message that a server does not take, or one that contradicts itself.
    Unexpected,
    /// The pool has no address left, or does not know the one that the message is about.
    NoAddress,
}

impl DhcpIgnored {
    /// Every one, in order of declaration.
    pub const ALL: [Self; 5] = [
        Self::Malformed,
        Self::ForeignClient,
        Self::OtherServer,
        Self::Unexpected,
        Self::NoAddress,
    ];

    /// What it is counted under.
    pub fn word(self) -> &'static str {
        match self {
            Self::Malformed => "dhcp_malformed",
            Self::ForeignClient => "dhcp_foreign_client",
            Self::OtherServer => "dhcp_other_server",
            Self::Unexpected => "dhcp_unexpected",
            Self::NoAddress => "dhcp_no_address",
        }
    }
}

/// Handles one message from a guest's link.
pub fn handle(
    leases: &mut Leases,
    config: &DhcpConfig,
    vm: VmId,
    mac: Mac,
    payload: &[u8],
    now: Time,
) -> DhcpOutcome {
    let request = match Request::parse(payload, mac) {
        Ok(request) => request,
        Err(why) => {
            return DhcpOutcome {
                ignored: Some(why),
                ..DhcpOutcome::default()
            };
        }
    };
    let client = Client { vm, mac, now };
    let mut outcome = match request.kind {
        DISCOVER => discover(leases, config, client, &request),
        REQUEST => request_address(leases, config, client, &request),
        DECLINE | RELEASE => give_up(leases, config, client, &request),
        INFORM => inform(leases, config, client, &request),
        _ => ignored(DhcpIgnored::Unexpected),
    };
    outcome.claimed_hostname = request.claimed_hostname();
    outcome
}

#[derive(Clone, Copy)]
struct Client {
    vm: VmId,
    mac: Mac,
    now: Time,
}

fn ignored(why: DhcpIgnored) -> DhcpOutcome {
    DhcpOutcome {
        ignored: Some(why),
        ..DhcpOutcome::default()
    }
}

fn discover(leases: &mut Leases, config: &DhcpConfig, client: Client, request: &Request<'_>) -> DhcpOutcome {
    let asked = request.address_option(OPT_REQUESTED_ADDRESS);
    match leases.offer(client.vm, client.mac, asked, client.now) {
        Some(address) => DhcpOutcome {
            reply: Some(
                Answer {
                    kind: OFFER,
                    yours: address,
                }
                .reply(config, client.mac, request),
            ),
            ..DhcpOutcome::default()
        },
        None => ignored(DhcpIgnored::NoAddress),
    }
}

/// RFC 2131 §4.3.2: which state the client is in shows from what it fills in.
fn request_address(
    leases: &mut Leases,
    config: &DhcpConfig,
    client: Client,
    request: &Request<'_>,
) -> DhcpOutcome {
    let requested = request.address_option(OPT_REQUESTED_ADDRESS);
    let current = Some(request.client_address).filter(|a| !a.is_unspecified());
    if let Some(server) = request.address_option(OPT_SERVER)
        && server != config.gateway
    {
        leases.withdraw(client.vm, client.mac);
        return ignored(DhcpIgnored::OtherServer);
    }
    // SELECTING and INIT-REBOOT name the address in an option, RENEWING and REBINDING in the header.
    let Some(wanted) = requested.or(current) else {
        return ignored(DhcpIgnored::Unexpected);
    };
    match leases.lease(client.vm, client.mac, wanted, client.now) {
        Some(released) => DhcpOutcome {
            reply: Some(
                Answer {
                    kind: ACK,
                    yours: wanted,
                }
                .reply(config, client.mac, request),
            ),
            bound: Some(wanted),
            released,
            ..DhcpOutcome::default()
        },
        None => DhcpOutcome {
            reply: Some(
                Answer {
                    kind: NAK,
                    yours: Ipv4Addr::UNSPECIFIED,
                }
                .reply(config, client.mac, request),
            ),
            ..DhcpOutcome::default()
        },
    }
}

fn give_up(leases: &mut Leases, config: &DhcpConfig, client: Client, request: &Request<'_>) -> DhcpOutcome {
    if request
        .address_option(OPT_SERVER)
        .is_some_and(|server| server != config.gateway)
    {
        return ignored(DhcpIgnored::OtherServer);
    }
    let (address, done) = if request.kind == RELEASE {
        let address = request.client_address;
        (address, leases.release(client.vm, client.mac, address))
    } else {
        let Some(address) = request.address_option(OPT_REQUESTED_ADDRESS) else {
            return ignored(DhcpIgnored::Unexpected);
        };
        (
            address,
            leases.decline(client.vm, client.mac, address, client.now),
        )
    };
    match done {
        true => DhcpOutcome {
            released: Some(address),
            ..DhcpOutcome::default()
        },
        false => ignored(DhcpIgnored::NoAddress),
    }
}

/// A client with an address of its own asks for the rest (RFC 2131 §4.3.5).
fn inform(leases: &mut Leases, config: &DhcpConfig, client: Client, request: &Request<'_>) -> DhcpOutcome {
    let address = request.client_address;
    if !leases.claim(client.vm, client.mac, address, client.now) {
        return ignored(DhcpIgnored::NoAddress);
    }
    DhcpOutcome {
        reply: Some(
            Answer {
                kind: ACK,
                yours: Ipv4Addr::UNSPECIFIED,
            }
            .reply(config, client.mac, request),
        ),
        bound: Some(address),
        ..DhcpOutcome::default()
    }
}

/// A client's message, as far as a server looks at it.
struct Request<'a> {
    kind: u8,
    header: &'a [u8],
    client_address: Ipv4Addr,
    broadcast: bool,
    /// Options by number, those that came in parts put together (RFC 3396).
    options: BTreeMap<u8, Vec<u8>>,
}

impl<'a> Request<'a> {
    fn parse(payload: &'a [u8], mac: Mac) -> Result<Self, DhcpIgnored> {
        let (header, rest) = payload
            .split_at_checked(HEADER_BYTES)
            .ok_or(DhcpIgnored::Malformed)?;
        let options = rest.strip_prefix(&MAGIC).ok_or(DhcpIgnored::Malformed)?;
        if header[..3] != [BOOT_REQUEST, HTYPE_ETHERNET, 6] {
            return Err(DhcpIgnored::Malformed);
        }
        if header[CHADDR..CHADDR + 6] != mac.0 || header[GIADDR..GIADDR + 4] != [0; 4] {
            return Err(DhcpIgnored::ForeignClient);
        }
        let options = parse_options(options);
        let Some([kind]) = options.get(&OPT_MESSAGE_TYPE).map(Vec::as_slice) else {
            return Err(DhcpIgnored::Malformed);
        };
        Ok(Self {
            kind: *kind,
            header,
            client_address: address_at(header, CIADDR).unwrap_or(Ipv4Addr::UNSPECIFIED),
            broadcast: header[FLAGS] & 0x80 != 0,
            options,
        })
    }

    fn address_option(&self, code: u8) -> Option<Ipv4Addr> {
        self.options
            .get(&code)
            .filter(|data| data.len() == 4)
            .and_then(|data| address_at(data, 0))
    }

    /// Never matched against anything, but printed on terminals.
    fn claimed_hostname(&self) -> Option<String> {
        let bytes = self.options.get(&OPT_HOST_NAME)?;
        let visible = |b: &u8| if b.is_ascii_graphic() { char::from(*b) } else { '?' };
        let name: String = bytes
            .iter()
            .take(HOST_NAME_BYTES_MAX)
            .filter(|b| **b != 0)
            .map(visible)
            .collect();
        Some(name).filter(|name| !name.is_empty())
    }

    /// Room for the DHCP message, from the largest IP packet that the client takes (RFC 2132 §9.10).
    fn room_bytes(&self, mtu_bytes: u16) -> usize {
        let taken = match self.options.get(&OPT_MAX_SIZE).map(Vec::as_slice) {
            Some([a, b]) => {
                u16::from_be_bytes([*a, *b]).clamp(MESSAGE_BYTES_MIN, mtu_bytes.max(MESSAGE_BYTES_MIN))
            }
            _ => MESSAGE_BYTES_MIN,
        };
        usize::from(taken) - IP_UDP_BYTES
    }
}

/// Reads options up to their end or the first that is cut short.
fn parse_options(mut bytes: &[u8]) -> BTreeMap<u8, Vec<u8>> {
    let mut options: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
    while let Some((&code, rest)) = bytes.split_first() {
        match code {
            OPT_PAD => bytes = rest,
            OPT_END => break,
            _ => {
                let Some((&length, rest)) = rest.split_first() else {
                    break;
                };
                let Some((data, rest)) = rest.split_at_checked(usize::from(length)) else {
                    break;
                };
                options.entry(code).or_default().extend_from_slice(data);
                bytes = rest;
            }
        }
    }
    options
}

fn address_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    bytes
        .get(at..at + 4)
        .and_then(|b| <[u8; 4]>::try_from(b).ok())
        .map(Ipv4Addr::from)
}

/// A server's message before it is written.
struct Answer {
    kind: u8,
    yours: Ipv4Addr,
}

impl Answer {
    fn reply(&self, config: &DhcpConfig, mac: Mac, request: &Request<'_>) -> DhcpReply {
        // RFC 2131 §4.1: a NAK is for everyone to see; else to the address that the client has, else to the one
        // it gets, unless it says that it cannot hear that yet.
        let (to, to_mac) = if self.kind == NAK {
            (Ipv4Addr::BROADCAST, Mac::BROADCAST)
        } else if !request.client_address.is_unspecified() {
            (request.client_address, mac)
        } else if request.broadcast {
            (Ipv4Addr::BROADCAST, Mac::BROADCAST)
        } else {
            (self.yours, mac)
        };
        DhcpReply {
            payload: self.payload(config, request),
            to,
            to_mac,
        }
    }

    fn payload(&self, config: &DhcpConfig, request: &Request<'_>) -> Vec<u8> {
        let mut header = [0; HEADER_BYTES];
        header[..3].copy_from_slice(&[BOOT_REPLY, HTYPE_ETHERNET, 6]);
        // Transaction id, flags and client are the request's; a NAK carries no client address.
        for field in [4..8, FLAGS..FLAGS + 2, CHADDR..CHADDR + 16] {
            header[field.clone()].copy_from_slice(&request.header[field]);
        }
        if self.kind == ACK {
            header[CIADDR..CIADDR + 4].copy_from_slice(&request.client_address.octets());
        }
        header[YIADDR..YIADDR + 4].copy_from_slice(&self.yours.octets());
        if self.kind != NAK {
            header[SIADDR..SIADDR + 4].copy_from_slice(&config.gateway.octets());
        }
        let mut message = Writer {
            bytes: header.to_vec(),
            room: request.room_bytes(config.mtu_bytes) - 1,
        };
        message.bytes.extend_from_slice(&MAGIC);
        message.option(OPT_MESSAGE_TYPE, &[self.kind]);
        message.option(OPT_SERVER, &config.gateway.octets());
        let echo = |message: &mut Writer, code| {
            if let Some(data) = request.options.get(&code) {
                message.option(code, data);
            }
        };
        echo(&mut message, OPT_CLIENT_ID);
        // RFC 3046 §2.1: relay information is the last; what comes before leaves it room.
        let relay = request
            .options
            .get(&OPT_RELAY_INFORMATION)
            .map_or(0, |data| encoded_bytes(data.len()));
        if self.kind != NAK {
            message.room = message.room.saturating_sub(relay);
            self.configuration(config, &mut message);
            message.room += relay;
        }
        echo(&mut message, OPT_RELAY_INFORMATION);
        message.bytes.push(OPT_END);
        // RFC 1542 §2.1: old clients take no message shorter than BOOTP's.
        if message.bytes.len() < BOOTP_BYTES_MIN {
            message.bytes.resize(BOOTP_BYTES_MIN, OPT_PAD);
        }
        message.bytes
    }

    fn configuration(&self, config: &DhcpConfig, message: &mut Writer) {
        // An answer to INFORM gives no address, and so no times (RFC 2131 §4.3.5).
        if !self.yours.is_unspecified() {
            let seconds = u32::try_from(config.lease_time.as_secs()).unwrap_or(u32::MAX);
            message.option(OPT_LEASE_TIME, &seconds.to_be_bytes());
            message.option(OPT_RENEWAL_TIME, &(seconds / 2).to_be_bytes());
            message.option(OPT_REBINDING_TIME, &(seconds - seconds / 8).to_be_bytes());
        }
        message.option(OPT_SUBNET_MASK, &config.subnet.netmask().octets());
        message.option(OPT_ROUTER, &config.gateway.octets());
        let dns: Vec<u8> = config
            .dns
            .iter()
            .take(DNS_SERVERS_MAX)
            .flat_map(|d| d.octets())
            .collect();
        message.option(OPT_DNS, &dns);
        message.option(OPT_MTU, &config.mtu_bytes.to_be_bytes());
        message.option(OPT_BROADCAST, &config.subnet.broadcast().octets());
        if let Some(domain) = config.search_domains.first() {
            message.option(OPT_DOMAIN_NAME, domain.as_str().as_bytes());
        }
        let room = message.room.saturating_sub(message.bytes.len());
        message.option(OPT_SEARCH, &search_list(&config.search_domains, room));
    }
}

struct Writer {
    bytes: Vec<u8>,
    /// Bytes that the message may have before its end option.
    room: usize,
}

impl Writer {
    /// Adds an option, in parts if it is long (RFC 3396); left out if it is empty or does not fit.
    fn option(&mut self, code: u8, data: &[u8]) {
        if data.is_empty() || self.bytes.len() + encoded_bytes(data.len()) > self.room {
            return;
        }
        for part in data.chunks(OPTION_BYTES_MAX) {
            self.bytes.push(code);
            self.bytes.push(u8::try_from(part.len()).unwrap_or(u8::MAX));
            self.bytes.extend_from_slice(part);
        }
    }
}

/// Bytes of an option's data with the code and length of each of its parts.
fn encoded_bytes(data: usize) -> usize {
    data + 2 * data.div_ceil(OPTION_BYTES_MAX)
}

/// The domains that fit, compressed among themselves (RFC 3397 §2).
fn search_list(domains: &[Name], room_bytes: usize) -> Vec<u8> {
    let mut list: Vec<u8> = Vec::new();
    let mut places: BTreeMap<&str, u16> = BTreeMap::new();
    // A byte that a host name cannot have would need its escape undone; no resolver searches such a domain.
    for domain in domains.iter().filter(|d| !d.as_str().contains('\\')) {
        let before = list.len();
        let mut new_places = Vec::new();
        let mut pointed = false;
        for suffix in domain.ancestors() {
            if let Some(place) = places.get(suffix) {
                list.extend_from_slice(&(0xc000 | place).to_be_bytes());
                pointed = true;
                break;
            }
            if let Ok(place) = u16::try_from(list.len())
                && place < 0xc000 >> 2
            {
                new_places.push((suffix, place));
            }
            let label = suffix.split('.').next().unwrap_or_default();
            list.push(u8::try_from(label.len()).unwrap_or_default());
            list.extend_from_slice(label.as_bytes());
        }
        if !pointed {
            list.push(0);
        }
        if encoded_bytes(list.len()) > room_bytes {
            list.truncate(before);
            break;
        }
        places.extend(new_places);
    }
    list
}

const HEADER_BYTES: usize = 236;
const BOOTP_BYTES_MIN: usize = 300;
const IP_UDP_BYTES: usize = 28;
/// RFC 2131 §2: every client takes an IP packet of this size.
const MESSAGE_BYTES_MIN: u16 = 576;
const OPTION_BYTES_MAX: usize = 255;
const HOST_NAME_BYTES_MAX: usize = 253;
const DNS_SERVERS_MAX: usize = 8;
const MAGIC: [u8; 4] = [0x63, 0x82, 0x53, 0x63];
const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
const HTYPE_ETHERNET: u8 = 1;

const FLAGS: usize = 10;
const CIADDR: usize = 12;
const YIADDR: usize = 16;
const SIADDR: usize = 20;
const GIADDR: usize = 24;
const CHADDR: usize = 28;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;

const OPT_PAD: u8 = 0;
const OPT_SUBNET_MASK: u8 = 1;
const OPT_ROUTER: u8 = 3;
const OPT_DNS: u8 = 6;
const OPT_HOST_NAME: u8 = 12;
const OPT_DOMAIN_NAME: u8 = 15;
const OPT_MTU: u8 = 26;
const OPT_BROADCAST: u8 = 28;
const OPT_REQUESTED_ADDRESS: u8 = 50;
const OPT_LEASE_TIME: u8 = 51;
const OPT_MESSAGE_TYPE: u8 = 53;
const OPT_SERVER: u8 = 54;
const OPT_MAX_SIZE: u8 = 57;
const OPT_RENEWAL_TIME: u8 = 58;
const OPT_REBINDING_TIME: u8 = 59;
const OPT_CLIENT_ID: u8 = 61;
const OPT_RELAY_INFORMATION: u8 = 82;
const OPT_SEARCH: u8 = 119;
const OPT_END: u8 = 255;

#[cfg(test)]
#[path = "dhcp_tests.rs"]
mod tests;
