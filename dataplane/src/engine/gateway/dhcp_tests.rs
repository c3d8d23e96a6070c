//! DHCP as a client meets it.

use super::*;
use crate::leases::{LEASE_TIME, LeaseConfig};

const VM: VmId = VmId(1);
const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const OTHER_VM: VmId = VmId(2);
const OTHER_MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);

struct Server {
    leases: Leases,
    config: DhcpConfig,
    now: Time,
}

impl Server {
    fn new() -> Self {
        let subnet: Ipv4Net = "192.168.127.0/24".parse().unwrap();
        let gateway = ip(1);
        Self {
            leases: Leases::new(LeaseConfig {
                subnet,
                reserved: vec![gateway, ip(254)],
                first: None,
                fixed: BTreeMap::new(),
                lease_time: LEASE_TIME,
            }),
            config: DhcpConfig {
                gateway,
                subnet,
                dns: vec![gateway],
                mtu_bytes: 1500,
                search_domains: ["corp.example.com", "example.com", "test"]
                    .map(|n| n.parse().unwrap())
                    .to_vec(),
                lease_time: LEASE_TIME,
            },
            now: Time::ZERO,
        }
    }

    fn send(&mut self, message: &Message) -> DhcpOutcome {
        handle(
            &mut self.leases,
            &self.config,
            VM,
            MAC,
            &message.bytes(),
            self.now,
        )
    }

    /// Goes through DISCOVER and REQUEST.
    fn bind(&mut self) -> Ipv4Addr {
        let offer = self.send(&Message::new(DISCOVER)).reply.unwrap();
        let offered = yours(&offer.payload);
        let selecting = Message::new(REQUEST)
            .option(OPT_SERVER, ip(1))
            .option(OPT_REQUESTED_ADDRESS, offered);
        assert_eq!(self.send(&selecting).bound, Some(offered));
        offered
    }
}

/// A client's message.
#[derive(Clone)]
struct Message {
    kind: u8,
    mac: Mac,
    client_address: Ipv4Addr,
    flags: u16,
    options: Vec<(u8, Vec<u8>)>,
}

impl Message {
    fn new(kind: u8) -> Self {
        Self {
            kind,
            mac: MAC,
            client_address: Ipv4Addr::UNSPECIFIED,
            flags: 0,
            options: Vec::new(),
        }
    }

    fn from(mut self, address: Ipv4Addr) -> Self {
        self.client_address = address;
        self
    }

    fn option(self, code: u8, address: Ipv4Addr) -> Self {
        self.data(code, &address.octets())
    }

    fn data(mut self, code: u8, data: &[u8]) -> Self {
        self.options.push((code, data.to_vec()));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[4..8].copy_from_slice(&0xdead_beef_u32.to_be_bytes());
        bytes[FLAGS..FLAGS + 2].copy_from_slice(&self.flags.to_be_bytes());
        bytes[CIADDR..CIADDR + 4].copy_from_slice(&self.client_address.octets());
        bytes[CHADDR..CHADDR + 6].copy_from_slice(&self.mac.0);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&[OPT_MESSAGE_TYPE, 1, self.kind]);
        for (code, data) in &self.options {
            bytes.extend_from_slice(&[*code, u8::try_from(data.len()).unwrap()]);
            bytes.extend_from_slice(data);
        }
        bytes.push(OPT_END);
        bytes
    }
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 127, last)
}

/// The options of an answer, once its header is found in order.
fn options(payload: &[u8]) -> BTreeMap<u8, Vec<u8>> {
    assert_eq!(payload[..8], *b"\x02\x01\x06\x00\xde\xad\xbe\xef");
    assert_eq!(payload[CHADDR..CHADDR + 6], MAC.0);
    assert_eq!(payload[HEADER_BYTES..HEADER_BYTES + 4], MAGIC);
    assert!(payload.len() >= BOOTP_BYTES_MIN);
    parse_options(&payload[HEADER_BYTES + 4..])
}

fn yours(payload: &[u8]) -> Ipv4Addr {
    address_at(payload, YIADDR).unwrap()
}

#[test]
fn discover_is_offered_everything_a_guest_needs() {
    let mut server = Server::new();
    let outcome = server.send(&Message::new(DISCOVER).data(OPT_HOST_NAME, b"web\x1b[1m"));
    assert_eq!(outcome.claimed_hostname.as_deref(), Some("web?[1m"));
    assert_eq!(outcome.bound, None, "an offer binds nothing");
    let reply = outcome.reply.unwrap();
    assert_eq!((reply.to, reply.to_mac), (ip(2), MAC));
    assert_eq!(yours(&reply.payload), ip(2));
    let options = options(&reply.payload);
    assert_eq!(options[&OPT_MESSAGE_TYPE], [OFFER]);
    for (option, address) in [
        (OPT_ROUTER, ip(1)),
        (OPT_SERVER, ip(1)),
        (OPT_DNS, ip(1)),
        (OPT_BROADCAST, ip(255)),
    ] {
        assert_eq!(options[&option], address.octets(), "{option}");
    }
    assert_eq!(options[&OPT_SUBNET_MASK], [255, 255, 255, 0]);
    for (option, seconds) in [
        (OPT_LEASE_TIME, 3600_u32),
        (OPT_RENEWAL_TIME, 1800),
        (OPT_REBINDING_TIME, 3150),
    ] {
        assert_eq!(options[&option], seconds.to_be_bytes(), "{option}");
    }
    assert_eq!(options[&OPT_MTU], 1500_u16.to_be_bytes());
    assert_eq!(options[&OPT_DOMAIN_NAME], b"corp.example.com");
    assert_eq!(
        options[&OPT_SEARCH], b"\x04corp\x07example\x03com\x00\xc0\x05\x04test\x00",
        "compressed"
    );
}

#[test]
fn selecting_binds_and_renewing_renews() {
    let mut server = Server::new();
    let address = server.bind();
    assert_eq!(server.leases.owner(address), Some(VM));
    server.now = Duration::from_secs(1800);
    let outcome = server.send(&Message::new(REQUEST).from(address));
    assert_eq!(outcome.bound, Some(address));
    let reply = outcome.reply.unwrap();
    assert_eq!(
        (reply.to, reply.to_mac),
        (address, MAC),
        "to the address that it has"
    );
    assert_eq!(options(&reply.payload)[&OPT_MESSAGE_TYPE], [ACK]);
    assert_eq!(
        (yours(&reply.payload), address_at(&reply.payload, CIADDR)),
        (address, Some(address))
    );
}

#[test]
fn init_reboot_gets_its_address_again_and_nak_for_a_wrong_one() {
    let mut server = Server::new();
    let again = server.send(&Message::new(REQUEST).option(OPT_REQUESTED_ADDRESS, ip(9)));
    assert_eq!(again.bound, Some(ip(9)), "free, and this server is the only one");
    server.leases.claim(OTHER_VM, OTHER_MAC, ip(10), Time::ZERO);
    for wrong in [Ipv4Addr::new(10, 0, 2, 15), ip(10), ip(1), ip(255)] {
        let mut message = Message::new(REQUEST).option(OPT_REQUESTED_ADDRESS, wrong);
        message.options.push((OPT_CLIENT_ID, vec![1, 2, 3]));
        let outcome = server.send(&message);
        assert_eq!(outcome.bound, None, "{wrong}");
        let reply = outcome.reply.unwrap();
        assert_eq!((reply.to, reply.to_mac), (Ipv4Addr::BROADCAST, Mac::BROADCAST));
        let options = options(&reply.payload);
        assert_eq!(options[&OPT_MESSAGE_TYPE], [NAK]);
        assert_eq!(
            options.keys().copied().collect::<Vec<_>>(),
            [OPT_MESSAGE_TYPE, OPT_SERVER, OPT_CLIENT_ID]
        );
    }
}

#[test]
fn a_new_address_gives_up_the_old_one() {
    let mut server = Server::new();
    let old = server.bind();
    let outcome = server.send(&Message::new(REQUEST).option(OPT_REQUESTED_ADDRESS, ip(77)));
    assert_eq!((outcome.bound, outcome.released), (Some(ip(77)), Some(old)));
}

#[test]
fn a_request_to_another_server_is_left_to_it() {
    let mut server = Server::new();
    server.send(&Message::new(DISCOVER)).reply.unwrap();
    let elsewhere = Message::new(REQUEST)
        .option(OPT_SERVER, ip(200))
        .option(OPT_REQUESTED_ADDRESS, ip(2));
    assert_eq!(server.send(&elsewhere), ignored(DhcpIgnored::OtherServer));
    assert_eq!(
        server.leases.offer(OTHER_VM, OTHER_MAC, Some(ip(2)), Time::ZERO),
        Some(ip(2)),
        "no longer offered"
    );
}

#[test]
fn release_and_decline_give_the_address_up() {
    let mut server = Server::new();
    let address = server.bind();
    let outcome = server.send(&Message::new(RELEASE).from(address).option(OPT_SERVER, ip(1)));
    assert_eq!(
        outcome,
        DhcpOutcome {
            released: Some(address),
            ..DhcpOutcome::default()
        }
    );
    assert_eq!(server.leases.owner(address), None);

    let address = server.bind();
    let decline = Message::new(DECLINE)
        .option(OPT_SERVER, ip(1))
        .option(OPT_REQUESTED_ADDRESS, address);
    assert_eq!(server.send(&decline).released, Some(address));
    assert_ne!(server.bind(), address, "set aside");
    let foreign = Message::new(RELEASE).from(ip(99));
    assert_eq!(server.send(&foreign), ignored(DhcpIgnored::NoAddress));
}

#[test]
fn inform_is_answered_without_address_or_times() {
    let mut server = Server::new();
    let outcome = server.send(&Message::new(INFORM).from(ip(40)));
    assert_eq!(outcome.bound, Some(ip(40)));
    let reply = outcome.reply.unwrap();
    assert_eq!(reply.to, ip(40));
    let options = options(&reply.payload);
    assert_eq!(options[&OPT_ROUTER], ip(1).octets());
    assert!(!options.contains_key(&OPT_LEASE_TIME));
    assert!(yours(&reply.payload).is_unspecified());
    let outside = server.send(&Message::new(INFORM).from(Ipv4Addr::new(10, 0, 0, 1)));
    assert_eq!(outside, ignored(DhcpIgnored::NoAddress));
}

#[test]
fn a_client_that_cannot_hear_unicast_is_answered_by_broadcast() {
    let mut server = Server::new();
    let mut message = Message::new(DISCOVER);
    message.flags = 0x8000;
    let reply = server.send(&message).reply.unwrap();
    assert_eq!((reply.to, reply.to_mac), (Ipv4Addr::BROADCAST, Mac::BROADCAST));
}

#[test]
fn another_clients_mac_is_ignored() {
    let mut server = Server::new();
    let mut message = Message::new(DISCOVER);
    message.mac = OTHER_MAC;
    assert_eq!(server.send(&message), ignored(DhcpIgnored::ForeignClient));
    assert_eq!(server.leases.in_use().count(), 0);
}

#[test]
fn identifiers_come_back_and_relay_information_is_last() {
    let mut server = Server::new();
    let message = Message::new(DISCOVER)
        .data(OPT_RELAY_INFORMATION, b"\x01\x02ab")
        .data(OPT_CLIENT_ID, b"\xffme");
    let payload = server.send(&message).reply.unwrap().payload;
    assert_eq!(options(&payload)[&OPT_CLIENT_ID], b"\xffme");
    let end = payload.iter().rposition(|b| *b == OPT_END).unwrap();
    assert_eq!(payload[end - 6..end], *b"\x52\x04\x01\x02ab");
}

#[test]
fn a_long_search_list_is_cut_to_what_the_client_takes() {
    let mut server = Server::new();
    server.config.search_domains = (0..80)
        .map(|n| format!("domain-{n}.test").parse().unwrap())
        .collect();
    let small = server.send(&Message::new(DISCOVER)).reply.unwrap().payload;
    assert!(small.len() <= 548, "{}", small.len());
    assert!(options(&small)[&OPT_SEARCH].starts_with(b"\x08domain-0\x04test\x00\x08domain-1\xc0\x09"));
    let large = server
        .send(&Message::new(DISCOVER).data(OPT_MAX_SIZE, &1500_u16.to_be_bytes()))
        .reply
        .unwrap()
        .payload;
    assert!(large.len() > 1200 && large.len() <= 1472, "{}", large.len());
    assert_eq!(
        options(&large)[&OPT_SEARCH].len(),
        15 + 9 * 11 + 70 * 12,
        "in parts of 255 bytes (RFC 3396)"
    );
}

#[test]
fn an_exhausted_pool_offers_nothing() {
    let mut server = Server::new();
    server.leases = Leases::new(LeaseConfig {
        subnet: "192.168.127.0/30".parse().unwrap(),
        reserved: vec![ip(1), ip(2)],
        first: None,
        fixed: BTreeMap::new(),
        lease_time: LEASE_TIME,
    });
    assert_eq!(
        server.send(&Message::new(DISCOVER)),
        ignored(DhcpIgnored::NoAddress)
    );
    assert_eq!(server.leases.counts().exhausted, 1);
}

#[test]
fn neither_the_hosts_address_nor_the_broadcast_address_is_ever_leased() {
    let mut server = Server::new();
    let mut given = std::collections::BTreeSet::new();
    for guest in 0..300u32 {
        let mac = Mac([2, 0, 0, 1, (guest >> 8) as u8, guest as u8]);
        let mut discover = Message::new(DISCOVER);
        discover.mac = mac;
        let mut hears = |message: &Message| {
            let now = server.now;
            handle(
                &mut server.leases,
                &server.config,
                VmId(100 + guest),
                mac,
                &message.bytes(),
                now,
            )
        };
        let Some(offer) = hears(&discover).reply else {
            continue;
        };
        let offered = yours(&offer.payload);
        let mut request = Message::new(REQUEST)
            .option(OPT_SERVER, ip(1))
            .option(OPT_REQUESTED_ADDRESS, offered);
        request.mac = mac;
        assert_eq!(hears(&request).bound, Some(offered));
        assert!(given.insert(offered), "{offered} is given twice");
    }
    // All but the network's, the gateway's, the host's and the broadcast address.
    assert_eq!(given.len(), 252);
    for nobodys in [ip(0), ip(1), ip(254), ip(255)] {
        assert!(!given.contains(&nobodys), "{nobodys}");
    }
    assert_eq!(server.leases.counts().exhausted, 48);
}

#[test]
fn a_client_is_known_by_its_mac_address_and_finds_its_lease_again() {
    let mut server = Server::new();
    let first = server.bind();
    server.now = Duration::from_secs(7_200);
    assert_eq!(server.bind(), first, "after its time, too");
    let mut other = Message::new(DISCOVER).data(OPT_CLIENT_ID, b"\xffme");
    other.mac = OTHER_MAC;
    let bytes = other.bytes();
    let outcome = handle(
        &mut server.leases,
        &server.config,
        OTHER_VM,
        OTHER_MAC,
        &bytes,
        server.now,
    );
    assert_ne!(yours(&outcome.reply.unwrap().payload), first);
    // Gone and back again, it has the same.
    server.leases.release_vm(VM);
    assert_eq!(server.bind(), first);
}

#[test]
fn whoever_asks_for_anothers_address_is_refused_and_the_other_keeps_it() {
    let mut server = Server::new();
    let own = server.bind();
    let mut steal = Message::new(REQUEST).option(OPT_REQUESTED_ADDRESS, own);
    steal.mac = OTHER_MAC;
    let outcome = handle(
        &mut server.leases,
        &server.config,
        OTHER_VM,
        OTHER_MAC,
        &steal.bytes(),
        server.now,
    );
    assert_eq!(outcome.bound, None);
    let payload = outcome.reply.unwrap().payload;
    assert_eq!(payload[CHADDR..CHADDR + 6], OTHER_MAC.0);
    assert_eq!(
        parse_options(&payload[HEADER_BYTES + 4..])[&OPT_MESSAGE_TYPE],
        [NAK]
    );
    assert_eq!(server.leases.holder(own), Some((VM, MAC)));
}

#[test]
fn the_links_mtu_is_told_whatever_it_is() {
    for mtu in [576_u16, 1400, 65_520] {
        let mut server = Server::new();
        server.config.mtu_bytes = mtu;
        let reply = server.send(&Message::new(DISCOVER)).reply.unwrap();
        assert_eq!(options(&reply.payload)[&OPT_MTU], mtu.to_be_bytes());
    }
}

/// A small generator of numbers (xorshift64), so that a failure can be run again.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % below as u64).unwrap()
    }
}

#[test]
fn no_bytes_make_it_panic_and_every_answer_fits() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut server = Server::new();
    let codes = [
        OPT_REQUESTED_ADDRESS,
        OPT_SERVER,
        OPT_MAX_SIZE,
        OPT_HOST_NAME,
        OPT_CLIENT_ID,
        OPT_RELAY_INFORMATION,
    ];
    for round in 0..20_000 {
        let mut message = Message::new(u8::try_from(random.next(10)).unwrap());
        for _ in 0..random.next(5) {
            let data: Vec<u8> = (0..random.next(8))
                .map(|_| u8::try_from(random.next(256)).unwrap())
                .collect();
            message = message.data(codes[random.next(codes.len())], &data);
        }
        if random.next(2) == 0 {
            message = message.from(ip(u8::try_from(random.next(256)).unwrap()));
        }
        let mut bytes = message.bytes();
        for _ in 0..random.next(4) {
            let at = random.next(bytes.len());
            bytes[at] = u8::try_from(random.next(256)).unwrap();
        }
        bytes.truncate(random.next(bytes.len() * 2));
        server.now += Duration::from_secs(1);
        let outcome = handle(&mut server.leases, &server.config, VM, MAC, &bytes, server.now);
        if let Some(reply) = outcome.reply {
            assert!(reply.payload.len() <= 1472, "round {round}");
            assert!(parse_options(&reply.payload[HEADER_BYTES + 4..]).contains_key(&OPT_SERVER));
        }
    }
    assert!(server.leases.in_use().count() <= crate::leases::HOLDINGS_PER_VM_MAX);
}
