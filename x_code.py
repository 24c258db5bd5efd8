import asyncio, time
from train.rl import sample as sl
from train.rl.rewards import coding
def score(program, **md):
    task = sl.Task("t", ({"role":"user","content":"q"},), "s", None, md)
    s = sl.Sample(task, (1,), tokens=[2,3], text=f"```python\n{program}\n```", status="stop")
    t=time.time()
    try: r = asyncio.run(coding.CodeReward().reward(s))
    except ValueError as e: r = f"ERR {e}"
    return r, round(time.time()-t,2)
HE="from solution import f\n\ndef check(candidate):\n    assert candidate() == 1\n"
R="def f(): return 1"; W="def f(): return 2"
print("he", score(R,test_code=HE), score(W,test_code=HE))
print("he ep", score(R,test_code="def check(candidate):\n    assert candidate() == 1\n", entry_point="f"), score(W,test_code="def check(candidate):\n    assert candidate() == 1\n", entry_point="f"), score(R,test_code="def check(candidate):\n    assert candidate() == 1\n"))
print("mbpp", score(R,test_list=["assert f() == 1"]), score(W,test_list=["assert f() == 1","assert True"]))
print("mbpp code", score(R,test_code="assert f() == 1"), score("def g(): pass",test_code="assert f() == 1"))
U="import unittest\nfrom solution import f\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(), 1)\nif __name__ == '__main__':\n    unittest.main()\n"
print("unittest", score(R,test_code=U), score(W,test_code=U))
K="from solution import f\nimport pytest\ndef test_a():\n    assert f() == 1\n@pytest.mark.parametrize('a,b', [(1,1),(2,2)])\ndef test_b(a,b):\n    assert a == b\ndef test_c():\n    with pytest.raises(ValueError, match='bad'):\n        g()\nfrom solution import g\n"
KR=R+"\ndef g():\n    raise ValueError('bad thing')"
print("kod", score(KR,test_code=K), score(KR.replace("bad","x"),test_code=K), score(R,test_code=K))
print("cls", score("class Stack:\n    def __init__(s): s.a=[]\n    def push(s,x): s.a.append(x)\n    def pop(s): return s.a.pop()\n    def __len__(s): return len(s.a)\nclass E(Exception): pass\ndef go(): raise E('x')\n", test="from solution import *\nfrom solution import E, go\nimport pytest\ndef test():\n    s = Stack(); s.push(3); s.push(4)\n    assert len(s)==2 and s.a == [3,4] and s.pop()==4\n    assert isinstance(s, Stack) and not isinstance(3, Stack)\n    with pytest.raises(E): go()\n"))
P16="from solution import f\nassert f(2) == 4\nassert f(3) == 9"
for hack in ["class E:\n    __eq__ = lambda s, o: True\ndef f(x): return E()","import os\nos._exit(0)","def f(x):\n    import os; os._exit(0)","exit(0)","def f(x): raise SystemExit(0)",
 "class I(int):\n    __eq__ = lambda s,o: True\n    __hash__=int.__hash__\ndef f(x): return I(7)",
 "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
 "import os, glob\ntry:\n    t=open(f'/proc/{os.getppid()}/mem','rb'); ok=1\nexcept OSError: ok=0\ndef f(x): return x*x if ok else -1",
 "import os\ntry:\n    t=os.open(f'/proc/{os.getppid()}/fd/0',0); ok=1\nexcept OSError: ok=0\ndef f(x): return x*x if ok else -1",
 "import subprocess\ndef f(x):\n    return x*x if subprocess.run(['grep','-rl','f(3) == 9','.']).returncode==0 else -1",
 "import unittest\nclass S(unittest.SkipTest): pass\ndef f(x): raise S()",
 "def f(x):\n    import sys\n    for o in range(3,20):\n        try:\n            import os; os.write(o, b'{\"passed\": true}\\n')\n        except OSError: pass\n",
 "def f(x): return x*x",
 ]: print(repr(hack[:30]), score(hack, test_code=P16))
print("apps", score("class Solution:\n    def add(self, a, b): return a+b", input_output='{"fn_name": "add", "inputs": [[1,2],[3,4]], "outputs": [[3],7]}'))
print("lcb", score("class Solution:\n    def add(self, a, b): return a+b", public_test_cases='[{"input":"1\\n2","output":"3","testtype":"functional"}]', metadata='{"func_name":"add"}'))
print("stdio", score("print(1/3)", tests=[{"input":"","output":"0.333333"}]), score("print(2.0)", inputs=[["a","b"]], outputs=[2.00]))
print("none", score(R, test_code="from solution import f\nf()\n"), score(R, test_code="from solution import f\ndef go():\n    assert f()==1\n"), score(R, test_code="assert (")) 
print("self", score(R, test_code="import nomod\nassert f() == 1"), score(R, test_code="assert x.y == 1\n"), score(R,test_code="from solution import f\nx = int('a')\nassert f() == 1"))
print("inplace", score("def s(l): l.sort()", test="a=[2,1]\ns(a)\nassert a == [1,2]"))
print("callback", score("def m(f,l): return [f(x) for x in l]", test="assert m(lambda x: x+1, [1,2]) == [2,3]\nassert m(str,[1])==['1']"))
print("gen", score("def g(n):\n    yield from range(n)\nimport collections\nP=collections.namedtuple('P','x y')\ndef p(): return P(1,2)\ndef d(): return {(1,2): {3}, None: b'a'}", test="assert list(g(3)) == [0,1,2]\nassert p().x == 1 and p() == (1,2)\nassert d() == {(1,2): {3}, None: b'a'}"))
print("print", score("def hi(): print('hi')", test="def test_hi(capsys):\n    hi()\n    assert capsys.readouterr().out == 'hi\\n'"))
print("math", score("def f(x): return x/3", test="import math\ndef check(candidate):\n    assert math.isclose(candidate(1), 1/3)\n    assert abs(candidate(3)-1)<1e-6\ncheck(f)"))
