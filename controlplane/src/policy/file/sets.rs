//! `sets`: named names and prefixes, some of them from lists that came along with the document.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use vnet_proto::model::{NamePattern, parse_prefix};

use super::LIST_MAX;
use crate::policy::keys;
use crate::policy::list::{self, Attachments, LISTS_BYTES_MAX, ListCache, ListFormat};
use crate::policy::names::NameTable;
use crate::policy::prefixes::PrefixTable;
use crate::policy::reader::{Reader, nearest};
use crate::policy::resolvers::Resolvers;
use crate::policy::yaml::{self, Node, Place, Value};
use crate::policy::{NameSet, PolicyWarning, PrefixSet};

/// Sets that a document may have.
pub(crate) const SETS_MAX: usize = 256;

/// Bytes of a set's name, and of a list's path.
const SET_NAME_BYTES_MAX: usize = 64;
const PATH_BYTES_MAX: usize = 1024;

/// The sets of a document.
#[derive(Debug, Default)]
pub(super) struct Sets {
    sets: HashMap<String, Set>,
}

#[derive(Debug, Default)]
struct Set {
    names: Vec<Arc<NameTable>>,
    prefixes: Vec<Arc<PrefixTable>>,
    place: Option<Place>,
    used: bool,
    /// It has problems, which are told; its uses are none.
    broken: bool,
}

impl Sets {
    pub(super) fn read(reader: &mut Reader, node: &Node, lists: &Attachments, cache: &ListCache) -> Self {
        let mut sets = Self::default();
        let Value::Map(entries) = &node.value else {
            let text = format!("sets is {} (expected a mapping from names to sets)", node.value);
            reader.problem(node, text);
            return sets;
        };
        if entries.len() > SETS_MAX {
            let text = format!("sets has {} entries (at most {SETS_MAX})", entries.len());
            reader.problem(node, text);
            return sets;
        }
        let bytes: usize = lists.0.values().map(|list| list.content.len()).sum();
        if bytes > LISTS_BYTES_MAX {
            let text =
                format!("the lists have {bytes} bytes together (at most {LISTS_BYTES_MAX}); split them");
            reader.problem(node, text);
            return sets;
        }
        for (key, value) in entries {
            let Some(name) = set_name(reader, key) else {
                continue;
            };
            let before = reader.problem_count();
            let mut set = read_set(reader, &name, value, lists, cache);
            set.place = Some(key.place);
            set.broken = reader.problem_count() != before;
            if sets.sets.insert(name.clone(), set).is_some() {
                reader.problem(key, format!("set {name} is given twice"));
            }
        }
        sets
    }

    /// Names, patterns, and names of sets, as one set of names.
    pub(super) fn names(&mut self, reader: &mut Reader, nodes: &[Node], key: &str) -> NameSet {
        let mut own = NameTable::default();
        let mut names = NameSet::default();
        for node in nodes {
            match self.reference(reader, node, key) {
                Reference::None => own.extend(read_name(reader, node, key).as_ref()),
                Reference::Broken => {}
                Reference::Set(set) if set.names.is_empty() => {
                    let text = format!("{key}: set {} has no domains", node.value);
                    reader.problem(node, text);
                }
                Reference::Set(set) => set.names.iter().for_each(|table| names.share(Arc::clone(table))),
            }
        }
        names.share(Arc::new(own.shrunk()));
        names
    }

    /// Prefixes, and names of sets, as one set of prefixes.
    pub(super) fn prefixes(&mut self, reader: &mut Reader, nodes: Vec<&Node>) -> PrefixSet {
        let mut own = Vec::new();
        let mut prefixes = PrefixSet::default();
        for node in nodes {
            match self.reference(reader, node, "cidr") {
                Reference::None => own.extend(read_prefix(reader, node)),
                Reference::Broken => {}
                Reference::Set(set) if set.prefixes.is_empty() => {
                    let text = format!("cidr: set {} has no cidrs", node.value);
                    reader.problem(node, text);
                }
                Reference::Set(set) => {
                    set.prefixes
                        .iter()
                        .for_each(|table| prefixes.share(Arc::clone(table)));
                }
            }
        }
        prefixes.share(Arc::new(own.into_iter().collect()));
        prefixes
    }

    /// Prefixes, names, and sets of either or both, as what a policy knows of DNS servers.
    pub(super) fn resolvers(
        &mut self,
        reader: &mut Reader,
        prefixes: Vec<&Node>,
        others: &[&Node],
        key: &str,
    ) -> Resolvers {
        let mut prefixes = self.prefixes(reader, prefixes);
        let (mut own, mut names) = (NameTable::default(), NameSet::default());
        for node in others {
            match self.reference(reader, node, key) {
                Reference::None => own.extend(read_name(reader, node, key).as_ref()),
                Reference::Broken => {}
                Reference::Set(set) => {
                    set.names.iter().for_each(|table| names.share(Arc::clone(table)));
                    set.prefixes
                        .iter()
                        .for_each(|table| prefixes.share(Arc::clone(table)));
                }
            }
        }
        names.share(Arc::new(own.shrunk()));
        Resolvers::with(&names, &prefixes)
    }

    fn reference(&mut self, reader: &mut Reader, node: &Node, key: &str) -> Reference<'_> {
        let Value::Text(text) = &node.value else {
            return Reference::None;
        };
        let Some(name) = text.strip_prefix('@') else {
            return Reference::None;
        };
        if !self.sets.contains_key(name) {
            let known: Vec<&str> = self.sets.keys().map(String::as_str).collect();
            let remedy = match nearest(name, &known) {
                Some(near) => format!("did you mean @{near}?"),
                None => "sets has no such name".to_owned(),
            };
            reader.problem(node, format!("{key}: set {} is not known ({remedy})", node.value));
        }
        match self.sets.get_mut(name) {
            Some(set) if !set.broken => {
                set.used = true;
                Reference::Set(set)
            }
            _ => Reference::Broken,
        }
    }

    /// A warning for each set that nothing refers to.
    pub(super) fn unused(&self) -> Vec<PolicyWarning> {
        let unused = self.sets.iter().filter(|(_, set)| !set.used);
        let warn = |(name, set): (&String, &Set)| {
            set.place.map(|place| PolicyWarning {
                line: place.line,
                column: place.column,
                text: format!("nothing refers to set @{name}"),
            })
        };
        unused.filter_map(warn).collect()
    }
}

/// What an entry of a list refers to.
enum Reference<'a> {
    /// It is no reference.
    None,
    /// To a set that is not there or has problems; both are told.
    Broken,
    Set(&'a Set),
}

fn set_name(reader: &mut Reader, key: &Node) -> Option<String> {
    let fits = |name: &&String| {
        (1..=SET_NAME_BYTES_MAX).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    let name = match &key.value {
        Value::Text(text) => Some(text).filter(fits),
        _ => None,
    };
    if name.is_none() {
        let expected = format!("(expected 1 to {SET_NAME_BYTES_MAX} letters, digits and . _ -)");
        reader.problem(key, format!("{} cannot be a set's name {expected}", key.value));
    }
    name.cloned()
}

fn read_set(reader: &mut Reader, name: &str, node: &Node, lists: &Attachments, cache: &ListCache) -> Set {
    let what = format!("sets.{name}");
    let before = reader.problem_count();
    let mut fields = reader.fields(node, &what, &keys::SET);
    let mut set = Set::default();
    if !fields.are_a_mapping() {
        return set;
    }
    if let Some(node) = fields.take("domains") {
        let nodes = reader.list_of_some(node, "domains", LIST_MAX);
        let mut table = NameTable::default();
        for node in nodes {
            if !is_reference(reader, node) {
                table.extend(read_name(reader, node, "domains").as_ref());
            }
        }
        set.names.push(Arc::new(table.shrunk()));
    }
    if let Some(node) = fields.take("cidrs") {
        let nodes = reader.list_of_some(node, "cidrs", LIST_MAX);
        let mut prefixes: Vec<IpNet> = Vec::new();
        for node in nodes {
            if !is_reference(reader, node) {
                prefixes.extend(read_prefix(reader, node));
            }
        }
        set.prefixes.push(Arc::new(prefixes.into_iter().collect()));
    }
    let format = fields
        .take("format")
        .map(|node| (node, reader.one_of(node, "format", &ListFormat::ALL)));
    match (fields.take("file"), format) {
        (Some(node), format) => {
            let format = format.and_then(|(_, format)| format).unwrap_or_default();
            read_list(reader, node, format, lists, cache, &mut set);
        }
        (None, Some((node, _))) => {
            reader.problem(
                node,
                "format is that of a file, and there is none; add file".to_owned(),
            );
        }
        (None, None) => {}
    }
    if set.names.is_empty() && set.prefixes.is_empty() && reader.problem_count() == before {
        let text = format!("{what} is empty (expected domains, cidrs or file)");
        reader.problem(node, text);
    }
    set
}

fn read_list(
    reader: &mut Reader,
    node: &Node,
    format: ListFormat,
    lists: &Attachments,
    cache: &ListCache,
    set: &mut Set,
) {
    let Some(path) = reader.text(node, "file") else {
        return;
    };
    if path.is_empty() || path.len() > PATH_BYTES_MAX || path.chars().any(super::is_unprintable) {
        reader.problem(
            node,
            format!("file {} is not a path that can be shown", node.value),
        );
        return;
    }
    let Some(attachment) = lists.0.get(path) else {
        reader.problem(node, list::missing(path));
        return;
    };
    match cache.list(path, format, attachment) {
        Ok(list) => {
            if list.names.is_empty() && list.prefixes.as_slice().is_empty() {
                reader.problem(node, format!("list {path:?} has no entry; is it the right file?"));
            }
            set.names
                .extend((!list.names.is_empty()).then(|| Arc::clone(&list.names)));
            let some = !list.prefixes.as_slice().is_empty();
            set.prefixes.extend(some.then(|| Arc::clone(&list.prefixes)));
        }
        Err(problems) => reader.problems_elsewhere(problems),
    }
}

fn is_reference(reader: &mut Reader, node: &Node) -> bool {
    let found = matches!(&node.value, Value::Text(text) if text.starts_with('@'));
    if found {
        let text = format!(
            "{} refers to a set, which a set cannot; refer to both where they are used",
            node.value
        );
        reader.problem(node, text);
    }
    found
}

fn read_prefix(reader: &mut Reader, node: &Node) -> Option<IpNet> {
    let text = reader.text(node, "cidr")?;
    parse_prefix(text)
        .map_err(|error| reader.problem(node, format!("cidr: {error}")))
        .ok()
}

fn read_name(reader: &mut Reader, node: &Node, key: &str) -> Option<NamePattern> {
    let text = reader.text(node, key)?;
    let found = NamePattern::from_str(text);
    if found.is_err() && (text.contains("://") || text.contains(':')) {
        let expected = "(expected a name alone, as example.com; ports go in ports)";
        reader.problem(
            node,
            format!("{key}: {} is more than a name {expected}", node.value),
        );
        return None;
    }
    found
        .map_err(|error| reader.problem(node, format!("{key}: {error}")))
        .ok()
}

/// The paths of all lists that a document names, each once. Whatever else is wrong with it is not told.
pub fn list_paths(document: &str) -> Vec<String> {
    let Ok(root) = yaml::load("", document) else {
        return Vec::new();
    };
    let mut paths: Vec<String> = Vec::new();
    for (_, set) in entries(&root, "sets").into_iter().flat_map(entries_of) {
        if let Some(Value::Text(path)) = entries(set, "file").map(|node| &node.value)
            && !paths.contains(path)
            && paths.len() < SETS_MAX
        {
            paths.push(path.clone());
        }
    }
    paths
}

fn entries_of(node: &Node) -> &[(Node, Node)] {
    match &node.value {
        Value::Map(entries) => entries,
        _ => &[],
    }
}

fn entries<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    let found = entries_of(node)
        .iter()
        .find(|(name, _)| matches!(&name.value, Value::Text(text) if text == key));
    found.map(|(_, value)| value)
}
