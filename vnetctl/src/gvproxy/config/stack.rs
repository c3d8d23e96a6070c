//! The network's part of the configuration: subnet and addresses, zones, forwards, leases.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::Ipv4Net;
use vnet_proto::model::{
    Name, NameError, RecordPattern, ZONE_PATTERNS_MAX, ZONE_RECORDS_MAX, ZONES_MAX, record_name,
};

use super::{
    Check, DEVICE_MAC_DEFAULT, Forward, HostPort, HostPortError, LogLevel, Problem, Record, SSH_PORT_DEFAULT,
    Stack, VPNKIT_UUID_DEFAULT, Warning, Zone,
};
use crate::gvproxy::flags::Flags;
use crate::gvproxy::origin::{Given, Origin};
use crate::gvproxy::yaml::{RecordKeys, StackKeys, ZoneKeys};
use crate::launch::{
    FORWARDS_MAX, GATEWAY_MAC_DEFAULT, MTU_BYTES_DEFAULT, MTU_BYTES_MAX, MTU_BYTES_MIN, Mac,
    SEARCH_DOMAINS_MAX, SUBNET_DEFAULT, SUBNET_PREFIX_MAX, SUBNET_PREFIX_MIN, ZONES_DEFAULT,
};

/// The three addresses that are the network's own.
struct Addresses {
    subnet: Ipv4Net,
    gateway: Ipv4Addr,
    device: Ipv4Addr,
    host: Ipv4Addr,
}

impl Check<'_> {
    pub(super) fn stack(
        &mut self,
        flags: &Flags,
        keys: StackKeys,
        log_level: LogLevel,
        ec2_metadata_access: bool,
    ) -> Stack {
        let mtu_bytes = self.mtu(flags, keys.mtu);
        let addresses = self.addresses(flags, keys.subnet, keys.gateway_ip, keys.device_ip, keys.host_ip);
        let Addresses {
            subnet,
            gateway,
            device,
            host,
        } = addresses;
        let gateway_mac = match keys.gateway_mac {
            Some(given) => self.mac(&given).unwrap_or(GATEWAY_MAC_DEFAULT),
            None => GATEWAY_MAC_DEFAULT,
        };
        let mut forwards = self.forwards(keys.forwards, subnet);
        let mut dns = self.zones(keys.dns);
        let mut dns_search_domains = self.search_domains(keys.dns_search_domains);
        let mut leases = self.leases(keys.dhcp_static_leases, &addresses);
        let mut vpnkit_uuid_macs = self.uuids(keys.vpnkit_uuid_macs);
        if flags.config.is_none() {
            // What the file would say has no say here.
            dns = default_zones(gateway, host);
            let domains = self.host.search_domains;
            dns_search_domains = self.at_most(domains.to_vec(), Origin::Default("the host's resolver"));
            forwards = self.ssh_port(flags.ssh_port, device).into_iter().collect();
            leases = BTreeMap::from([(device, DEVICE_MAC_DEFAULT)]);
            vpnkit_uuid_macs = BTreeMap::from([(VPNKIT_UUID_DEFAULT.to_owned(), DEVICE_MAC_DEFAULT)]);
        } else if let Some(port) = flags.ssh_port {
            self.warnings.push(Warning::SshPortUnused { port, guest: device });
        }
        let nat = self.nat(keys.nat);
        let virtual_ips = keys.gateway_virtual_ips;
        let virtual_ips: Vec<Ipv4Addr> = virtual_ips.iter().filter_map(|given| self.ipv4(given)).collect();
        let capture_file = flags.pcap.clone().map(|path| Given::flag("pcap", path));
        Stack {
            debug: keys.debug || log_level >= LogLevel::Debug,
            capture_file: capture_file.or_else(|| keys.capture_file.map(|given| given.map(PathBuf::from))),
            mtu_bytes,
            subnet,
            gateway_ip: gateway,
            device_ip: device,
            host_ip: host,
            gateway_mac,
            dns,
            dns_search_domains,
            dns_search_follows_host: flags.config.is_none(),
            forwards,
            nat: if nat.is_empty() {
                BTreeMap::from([(host, Ipv4Addr::LOCALHOST)])
            } else {
                nat
            },
            gateway_virtual_ips: if virtual_ips.is_empty() {
                vec![host]
            } else {
                virtual_ips
            },
            dhcp_static_leases: leases,
            vpnkit_uuid_macs,
            ec2_metadata_access,
        }
    }

    fn mtu(&mut self, flags: &Flags, key: Option<Given<i64>>) -> u16 {
        // Nought is what gvproxy has for none.
        let flag = flags.mtu.map(|mtu| Given::flag("mtu", mtu));
        let given = [flag, key].into_iter().flatten().find(|given| given.value != 0);
        let Some(Given { value: found, from }) = given else {
            return MTU_BYTES_DEFAULT;
        };
        match u16::try_from(found) {
            Ok(mtu) if (MTU_BYTES_MIN..=MTU_BYTES_MAX).contains(&mtu) => return mtu,
            Ok(mtu) if mtu > MTU_BYTES_MAX => {
                let used = MTU_BYTES_MAX;
                self.warnings.push(Warning::MtuLowered { from, found, used });
                return used;
            }
            _ => self.problems.push(Problem::Mtu { from, found }),
        }
        MTU_BYTES_DEFAULT
    }

    fn addresses(
        &mut self,
        flags: &Flags,
        subnet: Option<Given<String>>,
        gateway: Option<Given<String>>,
        device: Option<Given<String>>,
        host: Option<Given<String>>,
    ) -> Addresses {
        let subnet = self.under("subnet", &flags.subnet, subnet);
        let gateway = self.under("gatewayIP", &flags.gateway_ip, gateway);
        let device = self.under("deviceIP", &flags.device_ip, device);
        let host = self.under("hostIP", &flags.host_ip, host);
        let problems = self.problems.len();
        let subnet = subnet.map_or(SUBNET_DEFAULT, |given| self.subnet(given));
        let is_subnet = self.problems.len() == problems;

        let first = u32::from(subnet.network());
        let mut address = |given: Option<Given<String>>, name, default: u32| {
            let default = Given {
                value: Ipv4Addr::from(default),
                from: Origin::Default(name),
            };
            match given {
                Some(given) => self.ipv4(&given).map(|value| Given {
                    value,
                    from: given.from,
                }),
                None => Some(default),
            }
        };
        let three = [
            address(gateway, "gatewayIP", first + 1),
            address(device, "deviceIP", first + 2),
            address(host, "hostIP", u32::from(subnet.broadcast()) - 1),
        ];
        // Beside a subnet that is wrong, every address is.
        if is_subnet {
            let known: Vec<&Given<Ipv4Addr>> = three.iter().flatten().collect();
            for (index, given) in known.iter().enumerate() {
                self.check_in_subnet(given.value, &given.from, subnet);
                if let Some(other) = known[..index].iter().find(|other| other.value == given.value) {
                    // The one that somebody gave is the one to change.
                    let (given, other) = match given.from {
                        Origin::Default(_) => (other, given),
                        _ => (given, other),
                    };
                    self.problems.push(Problem::Taken {
                        from: given.from.clone(),
                        found: given.value,
                        other: other.from.clone(),
                    });
                }
            }
        }
        let [gateway, device, host] = three.map(|given| given.map_or(subnet.network(), |given| given.value));
        Addresses {
            subnet,
            gateway,
            device,
            host,
        }
    }

    /// The file's value, else the flag's: the other way round than everywhere else.
    fn under(
        &mut self,
        name: &'static str,
        flag: &Option<String>,
        key: Option<Given<String>>,
    ) -> Option<Given<String>> {
        let (Some(found), Some(given)) = (flag, &key) else {
            return key.or_else(|| flag.clone().map(|value| Given::flag(name, value)));
        };
        if *found != given.value {
            self.warnings.push(Warning::Overruled {
                flag: name,
                found: found.clone(),
                key: given.from.clone(),
            });
        }
        key
    }

    fn subnet(&mut self, given: Given<String>) -> Ipv4Net {
        let Given { value: found, from } = given;
        let problem = match found.parse::<Ipv4Net>() {
            Err(_) => Problem::Subnet { from, found },
            Ok(net) if !(SUBNET_PREFIX_MIN..=SUBNET_PREFIX_MAX).contains(&net.prefix_len()) => {
                Problem::SubnetSize { from, found: net }
            }
            // Host bits say nothing, as in 192.168.127.1/24.
            Ok(net) if is_unusable(net.trunc()) => Problem::SubnetKind { from, found: net },
            Ok(net) => return net.trunc(),
        };
        self.problems.push(problem);
        SUBNET_DEFAULT
    }

    fn check_in_subnet(&mut self, found: Ipv4Addr, from: &Origin, subnet: Ipv4Net) {
        let from = from.clone();
        if !subnet.contains(&found) {
            self.problems.push(Problem::NotInSubnet { from, found, subnet });
        } else if found == subnet.network() || found == subnet.broadcast() {
            self.problems.push(Problem::Reserved { from, found, subnet });
        }
    }

    /// The forward to the guest's SSH, which holds only without `-config`.
    fn ssh_port(&mut self, port: Option<i64>, device: Ipv4Addr) -> Option<Forward> {
        let port = match port {
            None => SSH_PORT_DEFAULT,
            Some(-1) => return None,
            Some(found) => match u16::try_from(found) {
                Ok(port) if port >= 1024 => port,
                _ => {
                    self.problems.push(Problem::SshPort(found));
                    return None;
                }
            },
        };
        let host = Ipv4Addr::LOCALHOST.to_string();
        Some(Forward {
            is_udp: false,
            listen: HostPort { host, port },
            guest: SocketAddr::new(device.into(), 22),
        })
    }

    fn forwards(&mut self, keys: Vec<(String, Given<String>)>, subnet: Ipv4Net) -> Vec<Forward> {
        if keys.len() > FORWARDS_MAX {
            let (found, most) = (keys.len(), FORWARDS_MAX);
            self.problems.push(Problem::ForwardMany { found, most });
            return Vec::new();
        }
        let mut forwards: Vec<(Forward, Origin)> = Vec::new();
        for (local, Given { value: found, from }) in keys {
            let (is_udp, at) = match local.strip_prefix("udp:") {
                Some(at) => (true, at),
                None => (false, &*local),
            };
            let listen = HostPort::parse(at);
            if let Err(error) = &listen {
                let (from, found) = (from.clone(), local.clone());
                self.problems.push(match error {
                    HostPortError::Port(port) => Problem::ForwardPort {
                        from,
                        port: port.clone(),
                    },
                    HostPortError::Form | HostPortError::NoPort(_) => Problem::ForwardListen { from, found },
                });
            }
            let guest = found.parse().ok().filter(|guest: &SocketAddr| guest.port() != 0);
            let Some(guest) = guest else {
                self.problems.push(Problem::ForwardGuest { from, found });
                continue;
            };
            let Ok(listen) = listen else { continue };
            if matches!(guest.ip(), IpAddr::V4(guest) if !subnet.contains(&guest)) {
                self.warnings.push(Warning::ForwardOutside {
                    from: from.clone(),
                    guest: guest.ip(),
                    subnet,
                });
            }
            let same = |(other, _): &&(Forward, Origin)| other.is_udp == is_udp && other.listen == listen;
            if let Some((_, other)) = forwards.iter().find(same) {
                let other = other.clone();
                self.problems.push(Problem::ForwardTwice { from, other });
                continue;
            }
            let forward = Forward {
                is_udp,
                listen,
                guest,
            };
            forwards.push((forward, from));
        }
        forwards.into_iter().map(|(forward, _)| forward).collect()
    }

    fn zones(&mut self, keys: Vec<ZoneKeys>) -> Vec<Zone> {
        let mut zones: Vec<Zone> = Vec::new();
        let mut known: HashMap<Option<Name>, Origin> = HashMap::new();
        for key in keys {
            let name = match key.name.filter(|name| name.value != ".") {
                Some(given) => match self.name(&given, Name::from_str) {
                    Some(name) => Some(name),
                    None => continue,
                },
                None => None,
            };
            if let Some(other) = known.get(&name) {
                self.warnings.push(Warning::ZoneTwice {
                    from: key.from,
                    other: other.clone(),
                });
                continue;
            }
            let holds = |zone: &&Zone| match (&zone.name, &name) {
                (None, _) => true,
                (Some(apex), Some(name)) => name.is_below(apex),
                (Some(_), None) => false,
            };
            // More than there may be are told of once, and not looked through.
            let before = &zones[..zones.len().min(ZONES_MAX)];
            if let Some(other) = before.iter().find(holds).and_then(|zone| known.get(&zone.name)) {
                self.warnings.push(Warning::ZoneHidden {
                    from: key.from.clone(),
                    other: other.clone(),
                });
            }
            if key.records.len() > ZONE_RECORDS_MAX {
                self.problems.push(Problem::RecordMany {
                    from: key.from.clone(),
                    found: key.records.len(),
                    most: ZONE_RECORDS_MAX,
                });
            }
            let records = key.records.into_iter().filter_map(|key| self.record(key));
            let records = records.collect();
            let default_ip = key.default_ip.and_then(|given| self.ip(&given));
            known.insert(name.clone(), key.from);
            zones.push(Zone {
                name,
                records,
                default_ip,
            });
        }
        let patterns = zones.iter().flat_map(|zone| &zone.records);
        let patterns = patterns.filter(|record| record.regexp.is_some()).count();
        for (what, found, most) in [
            ("zones", zones.len(), ZONES_MAX),
            ("records with a regexp", patterns, ZONE_PATTERNS_MAX),
        ] {
            if found > most {
                self.problems.push(Problem::ZoneMany { what, found, most });
            }
        }
        zones
    }

    fn record(&mut self, key: RecordKeys) -> Option<Record> {
        if key.name.is_none() && key.regexp.is_none() {
            self.problems.push(Problem::RecordNameless(key.from));
            return None;
        }
        if let Some(given) = &key.regexp
            && let Err(source) = RecordPattern::new(&given.value)
        {
            self.problems.push(Problem::Pattern {
                from: given.from.clone(),
                found: given.value.clone(),
                source,
            });
        }
        Some(Record {
            name: key.name.and_then(|given| self.name(&given, record_name)),
            regexp: key.regexp.map(|given| given.value),
            ip: key.ip.and_then(|given| self.ip(&given)),
        })
    }

    fn search_domains(&mut self, keys: Vec<Given<String>>) -> Vec<Name> {
        let Some(first) = keys.first().map(|given| given.from.clone()) else {
            return Vec::new();
        };
        let names = keys.iter().filter_map(|given| self.name(given, Name::from_str));
        let names = names.collect();
        self.at_most(names, first)
    }

    fn at_most(&mut self, mut names: Vec<Name>, from: Origin) -> Vec<Name> {
        if names.len() > SEARCH_DOMAINS_MAX {
            self.warnings.push(Warning::SearchMany {
                from,
                found: names.len(),
                most: SEARCH_DOMAINS_MAX,
            });
            names.truncate(SEARCH_DOMAINS_MAX);
        }
        names
    }

    fn leases(
        &mut self,
        keys: Vec<(String, Given<String>)>,
        addresses: &Addresses,
    ) -> BTreeMap<Ipv4Addr, Mac> {
        let mut leases = BTreeMap::new();
        let mut owners: HashMap<Mac, Ipv4Addr> = HashMap::new();
        for (address, given) in keys {
            let address = self.ipv4(&Given {
                value: address,
                from: given.from.clone(),
            });
            let (Some(mac), Some(found)) = (self.mac(&given), address) else {
                continue;
            };
            let from = given.from;
            self.check_in_subnet(found, &from, addresses.subnet);
            for (owner, taken) in [("gateway", addresses.gateway), ("host", addresses.host)] {
                if found == taken {
                    let from = from.clone();
                    self.problems.push(Problem::LeaseTaken { from, found, owner });
                }
            }
            if let Some(other) = owners.insert(mac, found) {
                self.problems.push(Problem::MacTwice {
                    from,
                    mac: mac.to_string(),
                    other,
                });
            }
            leases.insert(found, mac);
        }
        leases
    }

    fn uuids(&mut self, keys: Vec<(String, Given<String>)>) -> BTreeMap<String, Mac> {
        let mut uuids = BTreeMap::new();
        for (found, given) in keys {
            let mac = self.mac(&given);
            let is_uuid = (1..=36).contains(&found.len()) && found.bytes().all(|b| b.is_ascii_graphic());
            if !is_uuid {
                let from = given.from;
                self.problems.push(Problem::Uuid { from, found });
            } else if let Some(mac) = mac {
                uuids.insert(found.to_ascii_lowercase(), mac);
            }
        }
        uuids
    }

    fn nat(&mut self, keys: Vec<(String, Given<String>)>) -> BTreeMap<Ipv4Addr, Ipv4Addr> {
        let mut nat = BTreeMap::new();
        for (from, given) in keys {
            let from = self.ipv4(&Given {
                value: from,
                from: given.from.clone(),
            });
            if let (Some(from), Some(to)) = (from, self.ipv4(&given)) {
                nat.insert(from, to);
            }
        }
        nat
    }

    fn ipv4(&mut self, given: &Given<String>) -> Option<Ipv4Addr> {
        let parsed = given.value.parse().ok();
        if parsed.is_none() {
            self.problems.push(Problem::Ipv4 {
                from: given.from.clone(),
                found: given.value.clone(),
            });
        }
        parsed
    }

    fn ip(&mut self, given: &Given<String>) -> Option<IpAddr> {
        let parsed = given.value.parse().ok();
        if parsed.is_none() {
            self.problems.push(Problem::Ip {
                from: given.from.clone(),
                found: given.value.clone(),
            });
        }
        parsed
    }

    fn mac(&mut self, given: &Given<String>) -> Option<Mac> {
        let parsed = mac(&given.value).filter(|mac| mac.is_unicast());
        if parsed.is_none() {
            self.problems.push(Problem::Mac {
                from: given.from.clone(),
                found: given.value.clone(),
            });
        }
        parsed
    }

    fn name(&mut self, given: &Given<String>, read: fn(&str) -> Result<Name, NameError>) -> Option<Name> {
        match read(&given.value) {
            Ok(name) => Some(name),
            Err(source) => {
                self.problems.push(Problem::Name {
                    from: given.from.clone(),
                    found: given.value.clone(),
                    source,
                });
                None
            }
        }
    }
}

/// A MAC address in one of the forms that Go takes: 5a:94:ef:e4:0c:ee, 5a-94-ef-e4-0c-ee or 5a94.efe4.0cee.
fn mac(text: &str) -> Option<Mac> {
    let separated = |mark: char, size: usize| {
        let mut parts = text.split(mark);
        text.contains(mark) && parts.all(|part| part.len() == size)
    };
    if !(separated(':', 2) || separated('-', 2) || separated('.', 4)) {
        return None;
    }
    let digits: Vec<char> = text.chars().filter(|c| !matches!(c, ':' | '-' | '.')).collect();
    if digits.len() != 12 {
        return None;
    }
    let mut mac = [0; 6];
    for (byte, pair) in mac.iter_mut().zip(digits.chunks(2)) {
        let value = pair[0].to_digit(16)? * 16 + pair[1].to_digit(16)?;
        *byte = u8::try_from(value).ok()?;
    }
    Some(Mac(mac))
}

/// `gateway` and `host`, in the names that containers know.
fn default_zones(gateway: Ipv4Addr, host: Ipv4Addr) -> Vec<Zone> {
    let record = |name: &str, address: Ipv4Addr| Record {
        name: Name::from_canonical(name).ok(),
        regexp: None,
        ip: Some(address.into()),
    };
    let zone = |name: &&str| Zone {
        name: Name::from_canonical(name).ok(),
        records: vec![record("gateway", gateway), record("host", host)],
        default_ip: None,
    };
    ZONES_DEFAULT.iter().map(zone).collect()
}

/// Whether no guest can be on such a network.
fn is_unusable(net: Ipv4Net) -> bool {
    let first = net.network();
    let link_local = Ipv4Addr::new(169, 254, 0, 0);
    let shares = net.contains(&link_local) || first.is_link_local();
    first.octets()[0] == 0 || first.is_loopback() || first.octets()[0] >= 224 || shares
}
