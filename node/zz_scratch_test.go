package node
import ("testing";"fmt")
func TestScratch(t *testing.T){
 base:="cluster: main\nname: n1\nrole: data\naddress: 10.0.0.1\n"
 for _,s:=range []string{base, base+"ports:\n  postgres: 5555\n", base+"log: {}\nports:\n", "", "# c\n", base+"postgress:\n  x: 1\n", base+"postgres:\n  memroy: 4GB\n",
  "name: n1\naddress: nonsense\n", "name: n1\naddress: 10\n", "name: n1\naddress: [1,2]\n", "name: n1\naddress:\n  a: b\n", base+"ports:\n  postgres: abc\n", base+"ports:\n  postgres: 70000\n", base+"ports:\n  postgres: -1\n", base+"ports:\n  postgres: 0\n",
  base+"ports:\n  postgres: 5432\n", base+"ports: 5\n", "name: [a\n", "name: n1\nname: n2\n", base+"name: n2\n", "name: n1\n\taddress: x\n", "just text\n", "- a\n- b\n", base+"postgres:\n  memory: 12\n", base+"postgres:\n  memory: 4GB\n  data_dir: rel\n",base+"postgres: {memory: 1, bin_dir: x}\n", base+"firewall:\n  mode: maybe\n", base+"log:\n  level: loud\n", "name: 5\naddress: 10.0.0.1\n", "name: n1\naddress: 127.0.0.1\n", "name: n1\nrole: boss\naddress: 10.0.0.1\n", "name: n1\n", "name: n1\naddress: \"\"\n","name: n1\naddress: ~\n", "name: \x00\n", base+"---\nname: n2\n", base+"? a\n", "name: &a n1\naddress: *b\n", "name: n1\naddress: fe80::1%eth0\n", "name: n1\naddress: ::ffff:10.0.0.1\n","name: admin\naddress: 10.0.0.1\n"} {
  c,err:=parseConfig("/etc/pgha/pgha.yml",[]byte(s))
  fmt.Printf("%q\n   => %v | %+v\n", s, err, c.Ports)
 }
}
